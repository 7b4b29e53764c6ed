"""What a shell needs to complete commands: `source <(kvcascade completion bash)`; a few seconds."""

import contextlib
import dataclasses
import importlib
import io
import re
from typing import Annotated, Literal

import tyro

from kvcascade.scripts.arguments import arguments_of


@dataclasses.dataclass(frozen=True)
class Args:
    """Print a script that completes commands and their flags."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]


def main(arguments: list[str]) -> None:
    """Ask every command for its help, and print a function of the flags in it."""
    args = arguments_of(Args, "completion", arguments)
    from kvcascade.scripts.cli import COMMANDS

    cases = "\n".join(f'    {command}) words="{" ".join(flags(command))}" ;;' for command in COMMANDS)
    if args.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(f"""_kvcascade() {{
  local words="{" ".join(COMMANDS)}"
  (( COMP_CWORD > 1 )) && case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _kvcascade kvcascade""")


def flags(command: str) -> list[str]:
    """The flags in a command's help."""
    if command == "completion":
        return ["bash", "zsh"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(f"kvcascade.scripts.{command}").main(["--help"])
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w.-]*", re.sub(r"\x1b\[[\d;]*m", "", said.getvalue()))))
