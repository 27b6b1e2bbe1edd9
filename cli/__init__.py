"""The `loractl` command: click commands that parse, call one function below, and print.

Refuses to know any rule of the domain.
"""
