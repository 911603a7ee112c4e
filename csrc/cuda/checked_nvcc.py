"""nvcc that fails where ptxas serialises wgmma: `python checked_nvcc.py nvcc ARGUMENTS...`.

ptxas then waits for every single wgmma, which costs a third of a kernel's speed and no bit of its
results, and says so in a remark that no build stops at.
"""

import subprocess
import sys


def main(command: list[str]) -> int:
    """Runs the compiler; its exit status, or 1 where it made a remark that has to be an error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode == 0 and "instructions are serialized" in done.stdout:
        print("error: a kernel's wgmma instructions are serialized, see the remark above")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
