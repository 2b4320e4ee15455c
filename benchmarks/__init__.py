"""Benchmarks of fastloss against its peers: `python -m benchmarks --help`."""
