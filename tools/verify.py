"""Check hdl against the model's own numbers: tools/verify.py --golden DIR

Computes every case of a golden folder again (float32, CPU), prints a table of errors and exits 1 on a miss.
"""

import argparse
from pathlib import Path

from hdl.errors import command_line
from hdl.golden import Check, check_case, open_golden


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--golden", type=Path, required=True, help="folder with index.json, o1-tiny and the cases"
    )
    golden, cases = open_golden(parser.parse_args().golden)

    checks: list[Check] = []
    print(f"{'case':<28} {'what':<38} {'error':>9}   {'bound':>9}")
    for case in cases:
        for check in check_case(golden, case):
            verdict = "ok" if check.passed else "MISS"
            print(f"{check.case:<28} {check.what:<38} {check.error:9.2g} <={check.bound:9.2g} {verdict}")
            checks.append(check)
    missed = sum(not check.passed for check in checks)
    print(f"{len(checks)} checks, {missed} missed")
    return 1 if missed or not checks else 0


if __name__ == "__main__":
    command_line(main)
