"""`python -m launcher`, and `torchrun -m launcher train CONFIG`."""

from launcher.cli.main import main

if __name__ == "__main__":
    main()
