"""`python -m dsmoe_jax COMMAND`."""

from dsmoe_jax.commands import main

if __name__ == "__main__":
    main()
