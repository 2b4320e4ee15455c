# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of fastloss against its peers: `python -m benchmarks --help`."""
