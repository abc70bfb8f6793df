"""One runnable file an experiment. To fork one, copy it, or import its Config and main and change a default."""
