"""Imports the library once, then forks a child for every line on standard input.

A line is JSON: ``["train", {options}]`` or ``["resume", {"path": …}]``, with a delay in seconds
after which the child is killed with SIGKILL, or null. Answers one line: exit status and seconds.
With the option ``sent`` the child notes in that file what a client hands on, before it does so.

Started as a process of its own, because only a process that has not computed anything yet may fork
safely with torch, and because importing torch for every kill would take most of the time.
"""

import hashlib
import json
import os
import signal
import sys
import time

from fedsa_secure.federation.masked_vector import MaskedVector
from fedsa_secure.runtimes import api

ACTIONS = {"train": api.train, "resume": api.resume}


def child(action: str, options: dict) -> None:
    try:
        if "sent" in options:
            note_sent(options.pop("sent"))
        ACTIONS[action](**options)
    except BaseException as error:  # the child must not return into the loop of its parent
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def note_sent(path: str) -> None:
    """Append client, round and digest of every upload to a file, in one write each."""
    write = MaskedVector.write
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(vector, each, number, bound, out):
        content = each.update.numpy().tobytes() + each.rounding_key
        line = [each.client, number, hashlib.sha256(content).hexdigest()]
        os.write(file, json.dumps(line).encode() + b"\n")
        write(vector, each, number, bound, out)

    MaskedVector.write = noted


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        action, options, delay = json.loads(line)
        begun = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            child(action, options)
        if delay is not None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        answer = [os.waitstatus_to_exitcode(status), time.perf_counter() - begun]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
