"""Seconds that tests wait for a process before they take it for hung."""

# Seconds.  Not a measure of speed: on two cores the slowest of them takes one minute, and a machine
# that is three times slower, or busy, must pass too.
PATIENCE = 900.0
