# SPDX-License-Identifier: Apache-2.0
"""What the sections on linear cross-entropy share: cases, jobs, the check of their answers, plots."""
