"""What the sections on linear cross-entropy share: cases, jobs, the check of their answers, plots."""
