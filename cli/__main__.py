"""`python -m loractl.cli`, the form that launchers such as torchrun need."""

from loractl.cli.main import main

if __name__ == "__main__":
    main()
