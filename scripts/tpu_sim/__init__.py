"""What a Pallas TPU kernel costs, without a TPU: compile it ahead of time and execute its scalar program.

`libtpu` compiles for any generation on a CPU host and can dump the final program, one VLIW bundle a line. Its scalar
half (loops, branches, tables in SMEM, DMA starts and waits) is close to SSA and depends on few integers such as group
sizes: it is *executed* here on concrete ones, while vector work is only counted. That gives the exact bundles, MXU
issues, HBM bytes and DMA stalls of one routing, balanced or skewed.

Model: one bundle = one cycle; an MXU takes one 16-row bfloat16 vreg in a fixed number of cycles (so that all MXUs reach
the vendor's peak); HBM is a FIFO at the vendor's bandwidth plus a fixed latency; a wait blocks until its copies have
landed. A program over two cores runs once per core id and the slower core sets the time.

Checked against published timings: simulated over measured is 0.88-0.95 on v5e; v6e is unchecked; the clock of tpu7x is
not public (2.2 GHz is inferred) and the ratio is 0.54-0.76 for large shapes. Rank kernels with it, never quote it as a
measured time. Not modelled: VMEM bank conflicts, HBM row effects, launch gaps, XLA work outside the Pallas kernels
(counted, not timed).

    generations.py  constants per TPU generation
    llo.py          dump text -> bundles of instructions
    scalar.py       one scalar instruction -> a closure over the machine
    program.py      bundles -> something that can be run
    machine.py      registers, SMEM, clocks, DMA queues; `simulate`
    known.py        which kernel operands are known from the known inputs
    profile.py      compile one case for one generation, simulate its variants
    driver.py       the same in a process of its own: libtpu reads its flags once, and may abort
"""

from tpu_sim.driver import profile_case
from tpu_sim.generations import GENERATIONS, Generation

__all__ = ["GENERATIONS", "Generation", "profile_case"]
