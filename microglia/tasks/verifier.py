"""The child process that compares answers with math-verify: a line of JSON in, `true` or `false` out.

Run by its path, so that it imports math-verify and nothing of this package.
"""

import json
import logging
import sys


def main() -> None:
    """Answer until the pipe is closed. The first line says that imports are done."""
    from math_verify import parse, verify

    logging.disable()  # it warns that time is not limited: whoever waits for the answer does that
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = (parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in json.loads(line))
        print(json.dumps(bool(verify(gold, answer, timeout_seconds=None))), flush=True)


if __name__ == "__main__":
    main()
