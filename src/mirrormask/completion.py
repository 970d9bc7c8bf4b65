"""``mirrormask completion``: a script that lets a shell complete commands, their options and files."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Mapping, Sequence

from mirrormask import checks

__all__ = ["main"]

BASH = """\
_mirrormask() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} options= words=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '{commands}' -- "$current"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    elif [[ $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
        local IFS=$'\\n'
        COMPREPLY+=($(compgen -f -- "$current"))
        compopt -o filenames 2>/dev/null
    fi
}}
complete -o default -F _mirrormask mirrormask
"""
ZSH = """\
_mirrormask() {{
    local -a options first
    if (( CURRENT == 2 )); then
        compadd -- {commands}
        return
    fi
    case ${{words[2]}} in
{cases}
    esac
    if [[ ${{words[CURRENT]}} == -* ]]; then
        compadd -a options
    else
        (( $#first )) && compadd -a first
        _files
    fi
}}
compdef _mirrormask mirrormask
"""
#: An option at the beginning of a line of help.
OPTION = re.compile(r"^ +(?:-\w, )?(--[A-Za-z][\w.-]*)", re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Run ``mirrormask completion`` with these arguments; the exit status.

    Raises:
        ValueError: the shell is unknown.
    """
    parser = checks.Parser(
        prog="mirrormask completion",
        description="Print a script for a shell, which then completes commands, their options, and files.",
        epilog="Example: mirrormask completion bash > ~/.local/share/bash-completion/completions/mirrormask",
    )
    parser.add_argument("shell", help="bash, zsh or fish")
    asked = parser.parse_args(checks.known_options(arguments, parser._option_string_actions)).shell
    writers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    print(writers[checks.check_known("shell", asked, writers)](table(), words()), end="")
    return 0


def table() -> dict[str, list[str]]:
    """Command -> its options, as its help has them, and the short names that it takes."""
    cli = importlib.import_module("mirrormask.cli")
    short = importlib.import_module("mirrormask.train.arguments").SHORT if "train" in cli._present() else {}
    found = {}
    for name in cli._present():
        options = dict.fromkeys(OPTION.findall(_help(name, [])))
        for word in words().get(name, ()) if name == "flow" else ():
            options |= dict.fromkeys(OPTION.findall(_help(name, [word])))
        options |= dict.fromkeys(f"--{one}" for one, meant in short.items() if f"--{meant}" in options)
        flags = [flag for flag in cli.FLAGS if flag != "--json" or name not in cli.RESULTLESS]
        found[name] = list(dict.fromkeys([*options, *flags]))
    return found


def words() -> dict[str, list[str]]:
    """Command -> what its first argument may be beside a file."""
    cli = importlib.import_module("mirrormask.cli")
    known = {"info": ["methods"], "completion": ["bash", "zsh", "fish"]}
    if "flow" in cli._present():
        known["flow"] = list(importlib.import_module("mirrormask.flow.commands").__all__)
    return {name: known[name] for name in cli._present() if name in known}


def _help(name: str, arguments: Sequence[str]) -> str:
    """A command's help; empty where what its parser needs is not installed."""
    cli = importlib.import_module("mirrormask.cli")
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit, ImportError):
        cli._command(name)([*arguments, "--help"])
    return text.getvalue()


def _bash(options: Mapping[str, Sequence[str]], first: Mapping[str, Sequence[str]]) -> str:
    return _filled(BASH, "        {}) options='{}' words='{}' ;;", options, first)


def _zsh(options: Mapping[str, Sequence[str]], first: Mapping[str, Sequence[str]]) -> str:
    return _filled(ZSH, "        {}) options=({}) first=({}) ;;", options, first)


def _filled(script: str, case: str, options: Mapping[str, Sequence[str]], first: Mapping[str, Sequence[str]]) -> str:
    cases = [case.format(name, " ".join(known), " ".join(first.get(name, ()))) for name, known in options.items()]
    return script.format(commands=" ".join(options), cases="\n".join(cases))


def _fish(options: Mapping[str, Sequence[str]], first: Mapping[str, Sequence[str]]) -> str:
    about = importlib.import_module("mirrormask.cli").COMMANDS
    lines = []
    for name, known in options.items():
        line = about[name][2].replace("'", "\\'")
        lines.append(f"complete -c mirrormask -n __fish_use_subcommand -f -a {name} -d '{line}'")
        seen = f"complete -c mirrormask -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{seen} -l {option[2:]}" for option in known]
        if name in first:
            lines.append(f"{seen} -a '{' '.join(first[name])}'")
    return "\n".join([*lines, ""])
