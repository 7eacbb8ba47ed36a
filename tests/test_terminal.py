"""Conversations on a terminal (editing, history, pasted text and Ctrl-C) and through a pipe (files and lost lines). The
model gets the messages that /save writes.

The terminals are pseudo-terminals, each with a fork of this process.
"""

import json
import os
import pty
import re
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import generate
from checkpoint import read_checkpoint, save_checkpoint
from cli.script import run_script
from engine.chat import Conversation
from tests.byte_models import set_up

# The template writes only the messages, so recall_model, which counts on after a digit, continues the last message
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
UP, LEFT, RIGHT, HOME, END, BACKSPACE = "\x1b[A", "\x1b[D", "\x1b[C", "\x1b[H", "\x1b[F", "\x7f"
ALT_ENTER, CTRL_C, CTRL_D = "\x1b\r", "\x03", "\x04"
PROMPT = ">\b\x1b[2C"  # an empty prompt, as prompt_toolkit draws it


@pytest.fixture(scope="module")
def counter(recall_model, tmp_path_factory) -> Path:
    """The folder of recall_model, with a context of 8192 tokens and a chat template."""
    folder = tmp_path_factory.mktemp("counter")
    (folder / "tokenizer.json").symlink_to(recall_model / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config, _, tensors = read_checkpoint(recall_model / "model.pth")
    save_checkpoint(folder / "model.pth", replace(config, max_seq_len=8192), tensors)
    return folder


class Terminal:
    """Runs generate.py --chat on a terminal."""

    def __init__(self, folder: Path, *args: str, without: str | None = None):
        """without: a module that cannot be imported."""
        self.shown = ""  # since the last call of wait
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os._exit(self.run(folder, args, without))
            finally:
                os._exit(1)

    def run(self, folder: Path, args: tuple[str, ...], without: str | None) -> int:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        os.environ |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        sys.argv = ["generate.py", f"--checkpoint_path={folder / 'model.pth'}", "--device=cpu", "--chat", *args]
        sys.modules |= {without: None} if without else {}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run_script(generate.main)
        except SystemExit as e:
            return e.code
        return 0

    def wait(self, text: str) -> str:
        """Waits until text is shown. Returns everything up to it, without the codes for colours and the cursor."""
        end = time.monotonic() + 60
        while text not in self.shown:
            assert select.select([self.fd], [], [], end - time.monotonic())[0], self.shown
            self.shown += os.read(self.fd, 2**16).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", before)

    def type(self, keys: str, until: str = PROMPT) -> str:
        """Types keys. Returns everything shown up to until."""
        data = keys.encode()
        while data:  # the terminal takes some thousand bytes at a time
            data = data[os.write(self.fd, data[:1024]) :]
        return self.wait(until)

    def end(self, key: str) -> int:
        """Types key, which ends the program. Returns the exit status."""
        os.write(self.fd, key.encode())
        try:
            while os.read(self.fd, 2**16):
                pass
        except OSError:  # on Linux a terminal's end is an error
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def contents(file: Path) -> list[str]:
    return [message["content"] for message in json.loads(file.read_text())]


def test_terminal(counter, tmp_path):
    terminal, file = Terminal(counter, "--temperature=0", "--system=Count!"), tmp_path / "a file"
    assert "Alt-Enter" in terminal.wait(PROMPT)
    expected, paste, long = ["Count!"], "\r\n  def f(x):\r\n\r\n      return  x\r\tP\n", "long " * 900 + "S"

    def say(keys: str, message: str, answer: str):
        assert f"\r\n{answer}\r\n" in terminal.type(keys + "\r")
        expected.extend([message, answer])

    say(f"cbS{HOME}X{RIGHT}Y{LEFT}{LEFT}Z{BACKSPACE}", "XcYbS", "🙂E")
    say(f"  a{ALT_ENTER}  bW", "  a\n  bW", "X")
    say(f"{UP}{BACKSPACE}S", "  a\n  bS", "🙂E")
    say(f"\x1b[200~{paste}\x1b[201~", "  def f(x):\n\n      return  x\n\tP", "")
    say(long, long, "🙂E")
    say(f"no{CTRL_C}S", "S", "🙂E")
    assert "written" in terminal.type(f"/Save {file}\r") and contents(file) == expected

    os.write(terminal.fd, b"0\r")  # a question that has no end
    terminal.wait("1234567890")
    assert "Stopped; /continue resumes the answer." in terminal.type(CTRL_C)
    os.write(terminal.fd, b"/continue\r")
    terminal.wait("4567890")
    terminal.type(CTRL_C)
    terminal.type(f"/save {file}\r")
    *before, question, answer = contents(file)
    assert (before, question) == (expected, "0") and len(answer) > 17
    assert answer == ("1234567890" * len(answer))[: len(answer)]
    assert terminal.end(CTRL_D) == 0


def test_an_empty_line_ends_with_ctrl_c(counter, tmp_path):
    terminal = Terminal(counter)
    terminal.wait(PROMPT)
    assert terminal.end(CTRL_C) == 130


def type_during_answer(terminal: Terminal, keys: str):
    """Types keys during an endless answer, and then stops it. Only the answer is shown."""
    terminal.wait("1234567890")
    os.write(terminal.fd, keys.encode())
    time.sleep(0.1)  # a terminal that echoes does so at once
    shown = terminal.wait("1234567890") + terminal.type(CTRL_C, until=" tokens/s")
    assert re.fullmatch(r"\d*\r\n\d+ tokens, [\d.]+", shown)


def test_typing_during_an_answer(counter, tmp_path):
    """Keys typed during an answer begin the next message. Whole lines become messages, and a pasted text stays one
    message."""
    terminal, file = Terminal(counter, "--temperature=0"), tmp_path / "file"
    terminal.wait(PROMPT)
    os.write(terminal.fd, b"0\r")
    type_during_answer(terminal, f"ac{LEFT}b{BACKSPACE}B{ALT_ENTER}" + "x" * 3000)
    terminal.wait("x" * 50)
    os.write(terminal.fd, f"{END}0\r".encode())
    type_during_answer(terminal, "\x1b[200~p\r q\x1b[201~0\r")
    type_during_answer(terminal, f"S\r/save {file}\r")
    terminal.wait("written")
    terminal.wait(PROMPT)
    assert contents(file)[::2] == ["0", "aB\n" + "x" * 3000 + "c0", "p\n q0", "S"]
    assert terminal.end(CTRL_D) == 0


def test_terminal_without_prompt_toolkit(counter, tmp_path):
    terminal = Terminal(counter, "--temperature=0", without="prompt_toolkit")
    assert "prompt_toolkit cannot be imported" in terminal.wait("\n> ")
    assert "cuts lines after 4095 bytes" in terminal.type("long " * 900 + "S\n", "\n> ")
    assert "\r\n🙂E\r\n" in terminal.type(" S\n", "\n> ")
    terminal.type(f"/save {tmp_path / 'file'}\n", "\n> ")
    assert contents(tmp_path / "file") == ["S", "🙂E"]
    os.write(terminal.fd, b"0\n")
    type_during_answer(terminal, "oneS\ntw")
    terminal.type(f"oS\n/save {tmp_path / 'file'}\n", until="written")
    terminal.wait("\n> ")
    assert contents(tmp_path / "file")[::2] == ["S", "0", "oneS", "twoS"]
    assert terminal.end(CTRL_D) == 0


# ---- Through a pipe -------------------------------------------------------------------------------------------------


def test_continue(counter, cli):
    """A character that is cut at the end of an answer is shown when /continue completes it."""
    said = "0\n/continue\nS\n/Continue\n/continue\n0\n//save 0\n"
    out = cli(counter, "--chat", "--temperature=0", "--max_new_tokens=2", stdin=said)
    assert out.splitlines() == ["12", "34", "", "🙂", "E", "12", "12"]


def test_stop_strings(counter, cli):
    """A stop string ends an answer, even across tokens, and is not shown. Its beginning is shown if the answer ends
    otherwise."""
    said = "0\n/continue\n/continue\n7\n"
    out = cli(counter, "--chat", "--temperature=0", "--max_new_tokens=2", "--stop=456", "--stop=23x", stdin=said)
    assert out.splitlines() == ["1", "23", "", "89"]


def test_save_and_load(counter, cli, tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    flags = ["--chat", "--temperature=0", "--max_new_tokens=2"]
    cli(counter, *flags, "--system=Hé\n", stdin=f"0\n/save {file}\n")
    saved = [("system", "Hé\n"), ("user", "0"), ("assistant", "12")]
    assert json.loads(file.read_text()) == [{"role": role, "content": content} for role, content in saved]
    said = f"W\n/load {file}\n//5\n/save {other}\n/reset\n/save {other}\n/load {other}\n/load {file}\n/save {other}\n"
    assert cli(counter, *flags, stdin=said).splitlines() == ["X", "67"]
    assert other.read_text() == file.read_text()


BAD_FILES = ["", "no JSON", "5", "{}", '["a"]', '[{"role": "user"}]', '[{"role": "user", "content": "a"}]']
BAD_FILES += ['[{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]']
BAD_FILES += ['[{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]']
BAD_FILES += ['[{"role": "system", "content": "\\ud800"}]', "[" * 10**5]


def test_bad_files(counter, monkeypatch, capsys, tmp_path):
    """Each bad file gives one line, and neither the conversation nor the file changes."""
    files = [tmp_path / str(i) for i in range(len(BAD_FILES))]
    for file, text in zip(files, BAD_FILES, strict=True):
        file.write_text(text)
    last = tmp_path / "last"
    paths = [*files, tmp_path, tmp_path / "missing/file", "a\0b"]
    said = "0\n" + "".join(f"/load {path}\n/save {path}\n" for path in paths) + f"/load ~none/x\n/save {last}\n"
    set_up(monkeypatch, counter / "model.pth", ["--chat", "--temperature=0", "--max_new_tokens=2"], said)
    with pytest.raises(SystemExit) as stopped:
        run_script(generate.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "12\n" and contents(last) == ["0", "12"]
    assert err.splitlines()[-1].endswith(f"not be answered: {2 * len(paths) + 1}")
    assert len(err.splitlines()) == 3 + 2 * len(paths) + 3
    assert [file.read_text() for file in files] == BAD_FILES
    assert {file.name for file in tmp_path.iterdir()} == {"last", *(file.name for file in files)}


@pytest.mark.parametrize("is_open", [False, True])
def test_lines_that_are_not_read(counter, monkeypatch, capsys, is_open):
    """Lines that are not read are counted, without waiting for more input."""

    def fail(self, message, max_new_tokens):
        raise MemoryError

    set_up(monkeypatch, counter / "model.pth", ["--chat"])
    monkeypatch.setattr(Conversation, "answer", fail)
    for_reading, for_writing = os.pipe()
    os.write(for_writing, b"a\n\nb\n" + b"c\n" * 10000)
    if not is_open:
        os.close(for_writing)
    monkeypatch.setattr(sys, "stdin", open(for_reading))
    with pytest.raises(SystemExit) as stopped:
        run_script(generate.main)
    *_, unread, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and error.startswith("generate.py: out of memory")
    assert unread == f"Lines on standard input that were not read: {'at least ' if is_open else ''}10001."
    assert os.get_blocking(for_reading)
    sys.stdin.close()
    if is_open:
        os.close(for_writing)
