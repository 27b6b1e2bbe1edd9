"""What a LoRA adapter is: its name, its files, its digest, and whether it can be trusted.

A library for the other three packages; refuses to know HTTP, the command line and where adapters are kept.
"""
