"""What keeps the load of the experts even."""
