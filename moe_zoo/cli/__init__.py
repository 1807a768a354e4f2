"""Command lines. Thin: they parse, call the package, print, and turn known errors into one line and exit code 2."""
