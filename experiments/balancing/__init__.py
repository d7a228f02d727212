"""Ways to balance the load of the experts."""
