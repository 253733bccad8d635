"""`python -m launcher`, and `torchrun -m moe_dist train CONFIG`."""

from launcher.cli.main import main

if __name__ == "__main__":
    main()
