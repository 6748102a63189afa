from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.shell import Shell, script_index
from gamenode.domain.template import Namespace, fill

SHELLS = [
    [found, *rest]
    for name, *rest in (("dash",), ("bash", "--posix"), ("busybox", "sh"), ("sh",))
    if (found := shutil.which(name))
]
HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned;",
    "' ; touch pwned; '",
    '" ; touch pwned; "',
    "a\ntouch pwned\n",
    "$HOME ${HOME} ~ * ? [a]",
    "\\",
    "\\'\\\"",
    "# x",
    "}",
    "-n",
    "  two  words  ",
    "a[$(touch pwned)]",
    "",
    "é 漢 😀",
]


def rewritten(*lines: str) -> tuple[list[str], dict[str, str]]:
    shell = Shell()
    results = [shell.line(line) for line in lines]
    assert not [mistake for _, mistakes in results for mistake in mistakes]
    return [text for text, _ in results], shell.variables


def refused(*lines: str) -> str:
    shell = Shell()
    mistakes = [mistake for line in lines for mistake in shell.line(line)[1]]
    assert len(mistakes) == 1
    return mistakes[0].reason


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: Path(words[0]).name)
@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "line",
    [
        "printf '<%s>' ${{ args.X }}",
        'printf "<%s>" "${{ args.X }}"',
        'printf "<%s>" "$(printf "%s." ${{ args.X }})" | sed \'$s/[.]>$/>/\'',
        "printf '<%s>' \"it's \"${{ args.X }} | sed \"1s/^<it's />/;1s/^>/</\"",
        "V=${{ args.X }}; printf '<%s>' \"$V\"",
        "if true; then (printf '<%s>' ${{ args.X }}); fi # it's ${{ args.X }}",
        "case ${{ args.X }} in *) printf '<%s>' ${{ args.X }};; esac",
    ],
)
def test_a_hostile_value_stays_one_word(
    shell: list[str], value: str, line: str, tmp_path: Path
) -> None:
    lines, variables = rewritten(line)
    values = {Namespace.ARGS: {"X": value}}
    environment = {name: fill(text, values) for name, text in variables.items()}
    (tmp_path / "afile").touch()
    done = subprocess.run(
        [*shell, "-e", "-c", "\n".join(lines)],
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere", **environment},
        cwd=tmp_path,
        capture_output=True,
        check=True,
        timeout=10,
    )
    assert done.stdout.decode() == f"<{value}>"
    assert [entry.name for entry in tmp_path.iterdir()] == ["afile"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("echo ${{ args.X }}", 'echo "${GAMENODE_ARG_X}"'),
        ('echo "a ${{ args.X }} b"', 'echo "a ${GAMENODE_ARG_X} b"'),
        ('echo "$(cat ${{ args.X }})"', 'echo "$(cat "${GAMENODE_ARG_X}")"'),
        ('echo "$(cat)" ${{ args.X }}', 'echo "$(cat)" "${GAMENODE_ARG_X}"'),
        ("echo 'a' ${{ args.X }}", "echo 'a' \"${GAMENODE_ARG_X}\""),
        ('echo \\" ${{ args.X }}', 'echo \\" "${GAMENODE_ARG_X}"'),
        ("echo it\\'s ${{ args.X }}", 'echo it\\\'s "${GAMENODE_ARG_X}"'),
        ("# it's ${{ args.X }}", "# it's ${GAMENODE_ARG_X}"),
        ("echo a#b'c' ${{ args.X }}", "echo a#b'c' \"${GAMENODE_ARG_X}\""),
        ("echo $((1 + (2))) ${{ args.X }}", 'echo $((1 + (2))) "${GAMENODE_ARG_X}"'),
        ("echo ${A:-'}'} ${{ args.X }}", "echo ${A:-'}'} \"${GAMENODE_ARG_X}\""),
        ('echo "${A:-\'}" ${{ args.X }}', 'echo "${A:-\'}" "${GAMENODE_ARG_X}"'),
        ("echo `echo \\`'` ${{ args.X }}", 'echo `echo \\`\'` "${GAMENODE_ARG_X}"'),
        ("cat <<<x ${{ args.X }}", 'cat <<<x "${GAMENODE_ARG_X}"'),
        ("${{ args.X }}${{ envs.Y }}", '"${GAMENODE_ARG_X}""${GAMENODE_ENV_Y}"'),
        ("echo \\\\${{ args.X }}", 'echo \\\\"${GAMENODE_ARG_X}"'),
        ('echo "\\$${{ args.X }}"', 'echo "\\$${GAMENODE_ARG_X}"'),
    ],
)
def test_quotes_are_added_where_the_authors_own_are_not(line: str, expected: str) -> None:
    assert rewritten(line)[0] == [expected]


def test_the_variables_carry_the_templates() -> None:
    _, variables = rewritten("${{args.X}} ${{ envs.Y }}", "${{ args.X }}")
    assert variables == {
        "GAMENODE_ARG_X": "${{ args.X }}",
        "GAMENODE_ENV_Y": "${{ envs.Y }}",
    }


def test_quotes_may_span_lines() -> None:
    assert rewritten('echo "a', '${{ args.X }}"', "${{ args.X }}")[0] == [
        'echo "a',
        '${GAMENODE_ARG_X}"',
        '"${GAMENODE_ARG_X}"',
    ]


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        (["echo '${{ args.X }}'"], "in single quotes"),
        (["echo 'a", "${{ args.X }}'"], "in single quotes"),
        (["echo `echo ${{ args.X }}`"], "in backquotes"),
        (["echo ${A:-${{ args.X }}}"], "inside ${…}"),
        (["echo $((${{ args.X }} + 1))"], "in arithmetic"),
        (["echo $((1 + (${{ args.X }})))"], "in arithmetic"),
        (['echo "$((1 + $(echo ${{ args.X }})))"'], "in arithmetic"),
        (["((N = ${{ args.X }}))"], "in arithmetic"),
        (["cat <<EOF", "${{ args.X }}", "EOF"], "here-document"),
        (["echo $'\\'' ${{ args.X }}"], "after $'…'"),
        (["echo $(case a in a) echo ${{ args.X }};; esac)"], "case"),
        (["echo $${{ args.X }}"], "right after $"),
        (["echo \\${{ args.X }}"], "right after \\"),
        (["echo ${{ args.X"], "not closed"),
        (["echo ${{ X }}"], "cannot be read"),
    ],
)
def test_a_template_is_refused_where_a_variable_would_not_be_its_value(
    lines: list[str], where: str
) -> None:
    assert where in refused(*lines)


@given(st.lists(st.text(alphabet="a '\"`\\$(){}<#\n;=") | st.just("${{ args.X }}"), max_size=12))
def test_no_script_makes_a_value_part_of_the_text(parts: list[str]) -> None:
    shell = Shell()
    text, _ = shell.line("".join(parts))
    assert "${{ args.X }}" not in text.replace("\\${{", "")
    assert set(shell.variables) <= {"GAMENODE_ARG_X"}


@pytest.mark.parametrize(
    ("words", "index"),
    [
        (["sh", "-c", "x"], 2),
        (["/bin/bash", "-ec", "x", "y"], 2),
        (["bash", "-eo", "pipefail", "-c", "x"], 4),
        (["env", "A=b", "sh", "-e", "-c", "x"], 5),
        (["sh", "script.sh", "-c", "x"], None),
        (["sh", "-c"], None),
        (["sh", "-e"], None),
        (["sh"], None),
        (["rsync", "-c", "x"], None),
        ([], None),
    ],
)
def test_the_script_of_a_shell_is_found(words: list[str], index: int | None) -> None:
    assert script_index(words) == index


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: Path(words[0]).name)
@pytest.mark.parametrize(
    "lines",
    [
        ['sh -c "echo ${{ args.X }}"'],
        ['timeout 5 bash -eu -c "echo ${{ args.X }}"'],
        ["sh -c ${{ args.X }}"],
        ['bash --posix -o pipefail -c "echo ${{ args.X }}"'],
        ["/bin/sh -ec echo\\ ${{ args.X }}"],
        ['sh -c "', "echo ${{ args.X }}", '"'],
        ['find . -exec sh -c "echo $1 ${{ args.X }}" x {} +'],
        ["eval echo ${{ args.X }}"],
        ['true; eval "V=${{ args.X }}"'],
        ["trap 'true' EXIT; trap \"echo ${{ args.X }}\" EXIT"],
        ["[[ ${{ args.X }} -eq 0 ]] || true"],
        ["let N=${{ args.X }}"],
    ],
)
def test_what_is_read_as_a_script_once_more_takes_no_template(
    shell: list[str], lines: list[str], tmp_path: Path
) -> None:
    rewriter = Shell()
    results = [rewriter.line(line) for line in lines]
    assert [m.reason for _, mistakes in results for m in mistakes] == [
        "a template cannot stand in what is read as a script once more"
    ]
    # And rightly so: were it let through, a value could run something, in one shell or another.
    if shell[0].endswith("bash"):
        script = "\n".join(text for text, _ in results)
        for value in ("$(touch pwned)", "; touch pwned", "a[$(touch pwned)]"):
            subprocess.run(
                ["bash", "-c", script],
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"], "GAMENODE_ARG_X": value},
                capture_output=True,
                timeout=10,
                check=False,
            )
        assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "lines",
    [
        ["sh -c 'echo \"$1\"' x ${{ args.X }}"],
        ["sh script.sh -c ${{ args.X }}"],
        ["push -c ${{ args.X }}"],
        ["eval true; echo ${{ args.X }}"],
        ['sh -c "', 'true" ${{ args.X }}', "echo ${{ args.X }}"],
        ["[ ${{ args.X }} -eq 0 ]"],
        ["[[ ${{ args.X }} == a ]]"],
        ["echo retrieval ${{ args.X }}"],
    ],
)
def test_what_is_read_once_takes_templates(lines: list[str]) -> None:
    rewritten(*lines)


def test_the_scan_takes_time_that_the_length_bounds() -> None:
    for piece in ("eval ", "sh -c ", '"', "[[ a ", "sh -a -a ", "${{ args.X }} ", 'sh -c "'):
        Shell().line(piece * 20_000)


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: Path(words[0]).name)
@pytest.mark.parametrize(
    "value", [*HOSTILE, "EOF\ntouch pwned\n", "%s%n", "../../etc", "-rf", "\x7f\x1b]0;x\x07", "\\n"]
)
def test_a_value_given_a_name_in_environment_is_one_word_in_a_here_document_too(
    shell: list[str], value: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*shell, "-e", "-c", 'cat <<EOF\n<$NAME>\nEOF\nprintf "<%s>" "$NAME"'],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "NAME": value},
        capture_output=True,
        timeout=10,
        check=True,
    )
    assert done.stdout == f"<{value}>\n<{value}>".encode()
    assert not (tmp_path / "pwned").exists()
