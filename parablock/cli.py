"""The command `parablock`: names the subcommands and passes the rest of the line on to the package that does the work.

Imports none of them before it is asked to: the core stays free of sockets, and `--help` is quick.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("parablock.quickstart", "broker + 2 workers on this machine, built-in tiny model and data"),
    "run": ("parablock.launch", "broker + N workers on this machine, your model and data"),
    "shards": ("workers.shards_command", "which of the N workers of a run would get which rows"),
    "broker": ("broker.__main__", "serve one run (= python -m broker)"),
    "worker": ("workers.__main__", "take part in a run (= python -m workers)"),
    "keys": ("broker.keys_command", "key pairs, and who may take part"),
    "invite": ("broker.invite_command", "the file that a worker needs to be given"),
    "plan": ("workers.plan_command", "whether the exchange will hide: measures this machine and the link"),
    "status": ("parablock.status_command", "how far a run is, who serves it and takes part, and its privacy so far"),
    "report": ("parablock.report", "one page with plots from a run's folder"),
    "evaluate": ("workers.evaluate_command", "held-out loss, perplexity, exact match and ROUGE-L of a run or a model"),
    "export": ("parablock.export", "write a run's model as a folder that transformers loads"),
    "verify": ("parablock.verify_command", "whether a run's folder is intact, and its journal made anew if not"),
    "gc": ("parablock.gc_command", "drop what is superseded in a run's folder"),
    "config": ("parablock.config_command", "show, check and explain settings"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done; 2 wrong input; 3 refused by the broker; 75 try again later."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"parablock: there is no command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        run: Callable[[Sequence[str]], int] = importlib.import_module(COMMANDS[command][0]).main
        return run(rest)
    except KeyboardInterrupt:
        print("parablock: interrupted", file=sys.stderr)
        return 75


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(["usage: parablock COMMAND ...", "", *lines, "", "parablock COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
