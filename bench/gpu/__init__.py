"""The plan of `make gpu`."""
