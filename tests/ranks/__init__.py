"""What the ranks of test_distributed.py do: workers run functions of these modules by name."""
