"""`python -m tpu_sim`: see driver.py."""

from tpu_sim.driver import main

main()
