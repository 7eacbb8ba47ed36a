"""A conversation on a terminal, or through a pipe with one message a line.

    python generate.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --chat

Answers go to standard output, everything else to standard error. On a terminal the user edits messages with
prompt_toolkit, so a message may be long and have several lines. With several ranks, only rank 0 reads input and touches
the files of /save and /load. engine/chat.py: Conversation generates the answers.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cli.ranks import input_lines
from cli.report import tokens_per_second
from engine.chat import Conversation, check_messages
from utils.errors import UsageError
from utils.files import read_json, replace_file

HELP = (
    "Type a message; /continue resumes an answer that was cut, /drop forgets the oldest message, /reset all of "
    "them, /save FILE writes them, /load FILE reads them, /exit ends."
)
COMMANDS = {  # command -> whether a file's name follows
    "/continue": False, "/drop": False, "/exit": False, "/help": False, "/reset": False, "/load": True, "/save": True,
}
COMMAND_PATTERN = re.compile(r"\s*(/\w+)(?:[ \t]+(.*?))?\s*")  # "." matches no line break: several lines are a message
LONGEST_LINE = 4095  # bytes; a terminal in canonical mode drops what exceeds them
BRACKETED_PASTE_ON, BRACKETED_PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # escape sequences
IFLAG, LFLAG = 0, 3  # indices into what termios.tcgetattr returns
CUT_NOTES = {  # an answer's finish_reason -> the note after the answer
    "length": "Cut by --max_new_tokens; /continue resumes the answer.",
    "context": "Cut because the context is full; /continue resumes the answer if there are older messages to forget.",
    "interrupted": "Stopped; /continue resumes the answer.",
}

Reader = Callable[[], str | None]  # returns the next message or command, None after the last


def converse(conversation: Conversation, max_new_tokens: int):
    """Reads lines from standard input until the input ends, and answers them. Ctrl-C stops an answer. If a line cannot
    be answered, prints a note. If standard input is not a terminal, such a line also raises UsageError at the end."""
    print_note(HELP)
    read = build_reader()
    commands = ChatCommands(conversation, max_new_tokens)
    try:
        for line in input_lines(lambda: commands.next_line(read)):
            command, argument = parse(line)
            if command == "/exit":
                break
            has_terminal = commands.has_read and is_terminal(sys.stdin)
            hold = hold_typing(is_canonical=read is read_line) if has_terminal else contextlib.nullcontext()
            with commands.print_errors(), hold:
                commands.run(command, argument)
    except Exception:
        if commands.has_read:
            print_unread()
        raise
    if commands.n_refused and not is_terminal(sys.stdin):
        raise UsageError(f"lines on standard input that could not be answered: {commands.n_refused}")


def parse(line: str) -> tuple[str, str]:
    """Splits a command into (command, argument). Returns ("", message) for a message. "//drop" is not a command but the
    message "/drop"."""
    match = COMMAND_PATTERN.fullmatch(line)
    if match:
        return match[1].lower(), match[2] or ""
    is_escaped = line.startswith("//") and COMMAND_PATTERN.fullmatch(line[1:])
    return "", line[1:] if is_escaped else line


def check_command(command: str, argument: str, line: str):
    if command not in COMMANDS:
        raise UsageError(f"{line} is none of the commands; to say it, write /{line}. {HELP}")
    if COMMANDS[command] and not argument:
        raise UsageError(f"{command} needs the name of a file; to say it, write /{line}.")
    if argument and not COMMANDS[command]:
        raise UsageError(f"{command} stands alone; to say it, write /{line}.")


class ChatCommands:
    """Carries out the commands and messages that the user types."""

    def __init__(self, conversation: Conversation, max_new_tokens: int):
        self.conversation, self.max_new_tokens = conversation, max_new_tokens
        self.has_read = False  # whether this rank has read standard input: only rank 0 does
        self.n_refused = 0  # lines that could not be answered
        self.has_said_full = False  # whether the user knows that old messages are forgotten

    @contextlib.contextmanager
    def print_errors(self) -> Iterator[None]:
        """Prints a UsageError within this context as a note, and counts the refused line."""
        try:
            yield
        except UsageError as e:
            self.n_refused += 1
            print_note(" ".join(str(e).split()))

    def next_line(self, read: Reader) -> str | None:
        """Returns the next line, or None after the last. Only rank 0 calls this method, and sends the line to all
        ranks. Only rank 0 may touch files. So it carries out /save here, and replaces the file's name in a /load with
        the file's contents."""
        self.has_read = True
        while (line := read()) is not None:
            command, argument = parse(line)
            if not command:
                return line
            path = Path(os.path.expanduser(argument))
            with self.print_errors():
                check_command(command, argument, shorten(line))
                if command == "/help":
                    print_note(HELP)
                    continue
                if command == "/load":
                    return f"/load {json.dumps(read_json(path))}"
                if command != "/save":
                    return line
                self.save(path)
        return None

    def save(self, path: Path):
        """Writes the conversation to path as JSON. An existing file is replaced only if it holds a conversation."""
        try:
            check_messages(read_json(path, default=[]))
        except UsageError:
            raise UsageError(f"{path} is there and holds no conversation; nothing is written") from None
        text = json.dumps(self.conversation.to_list(), indent=1, ensure_ascii=False) + "\n"
        try:
            replace_file(path, text.encode())
        except (OSError, ValueError) as e:
            raise UsageError(f"cannot write {path}: {e}") from None
        print_note(f"{path} is written.")

    def run(self, command: str, argument: str):
        """Carries out a command. Command "" answers the message in argument."""
        conversation = self.conversation
        if command == "/continue":
            self.stream_answer(lambda: conversation.continue_answer(self.max_new_tokens))
        elif command == "/drop":
            forgotten = [shorten(message["content"]) for message in conversation.drop_oldest()]
            what = f'"{forgotten[0]}" and its answer are forgotten' if forgotten else "There is nothing to forget"
            print_note(f"{what}; {len(conversation.messages)} messages left.")
        elif command == "/reset":
            conversation.drop_all()
            print_note("0 messages left.")
        elif command == "/load":
            conversation.load(json.loads(argument))
            print_note(f"{len(conversation.messages)} messages loaded.")
        elif argument:
            self.stream_answer(lambda: conversation.answer(argument, self.max_new_tokens))

    def stream_answer(self, start: Callable[[], Iterator[str]]):
        """Prints the answer that start() begins, piece by piece, and then a note on its end. Ctrl-C stops only the
        answer."""
        conversation = self.conversation
        is_stopped = False
        try:
            pieces = start()
            if conversation.n_dropped and not self.has_said_full:
                print_note("The context is full: from now on the oldest messages are forgotten.")
                self.has_said_full = True
            print_pieces(pieces)
        except KeyboardInterrupt:
            is_stopped = True
        times = conversation.token_times
        if len(times) > 1:
            print_note(f"{len(times)} tokens, {tokens_per_second(times):.1f} tokens/s")
        if is_stopped and conversation.finish_reason != "interrupted":
            print_note("Stopped before the answer; the message is forgotten.")
        elif conversation.finish_reason in CUT_NOTES:
            print_note(CUT_NOTES[conversation.finish_reason])


def print_pieces(pieces: Iterator[str]):
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                print(piece, end="", flush=True)
    finally:
        print(flush=True)


def print_note(text: str):
    """Prints a message of the program, not of the model."""
    if sys.stderr.isatty():
        text = f"\033[2m{text}\033[0m"  # dim
    print(text, file=sys.stderr, flush=True)


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---- Standard input -------------------------------------------------------------------------------------------------


def build_reader() -> Reader:
    """Returns a Reader: prompt_toolkit's if standard input and output are a terminal, else one of plain lines."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        return read_line
    try:
        return build_editor()
    except ImportError as e:
        print_note(f"Lines are read without editing keys and history, because prompt_toolkit cannot be imported: {e}")
        return read_line


def is_terminal(stream) -> bool:
    return stream is not None and stream.isatty()  # None means that the shell has closed the stream (<&-)


@contextlib.contextmanager
def hold_typing(is_canonical: bool) -> Iterator[None]:
    """Hides what the user types within this context. The terminal keeps it for the next Reader. In canonical mode, the
    terminal edits lines itself. Otherwise it keeps the keys for prompt_toolkit."""
    import termios  # here, because only a conversation on a terminal needs this module

    before, held = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
    held[LFLAG] &= ~termios.ECHO
    held[LFLAG] |= termios.NOFLSH  # Ctrl-C stops the answer, but does not discard what was typed
    if not is_canonical:
        held[LFLAG] &= ~(termios.ICANON | termios.IEXTEN)
        held[IFLAG] &= ~termios.ICRNL  # prompt_toolkit expects Enter as "\r"
        print(BRACKETED_PASTE_ON, end="", flush=True)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, held)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        print("" if is_canonical else BRACKETED_PASTE_OFF, end="", flush=True)


def build_editor() -> Reader:
    # here, because only a conversation on a terminal needs prompt_toolkit
    from prompt_toolkit import PromptSession
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    is_editing = has_focus(DEFAULT_BUFFER)  # the user edits the message, and does not search the history

    @keys.add("escape", "enter", filter=is_editing)
    def break_line(event):
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=is_editing)
    def clear_or_end(event):
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    session = PromptSession("> ", key_bindings=keys, enable_suspend=True)  # Ctrl-Z suspends

    def read() -> str | None:
        try:
            # In the editor Ctrl-C is a key. handle_sigint=False leaves the signal's handler as cli/ has set it.
            return session.prompt(handle_sigint=False).rstrip().lstrip("\n")
        except EOFError:
            return None

    print_note("Enter sends, Alt-Enter begins a new line. What is pasted stays as it is.")
    return read


def read_line() -> str | None:
    """Reads the next line of standard input and strips it. Returns None after the last line."""
    while sys.stdin is not None:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        # sys.stdin.readline would read ahead to decode, and print_unread would miss those lines.
        line = sys.stdin.buffer.readline()
        if not line:
            break
        if sys.stdin.isatty() and len(line) > LONGEST_LINE:
            print_note(f"This terminal cuts lines after {LONGEST_LINE} bytes, so that line is not sent.")
            continue
        try:
            return line.decode(sys.stdin.encoding).strip()
        except UnicodeDecodeError:
            raise UsageError("what came on standard input is not UTF-8 text") from None
    return None


def print_unread():
    """After an error, prints how many lines of a pipe were not read. Does not wait for lines that are not yet written
    to the pipe."""
    if sys.stdin is None or sys.stdin.isatty():
        return
    pipe = sys.stdin.buffer
    with contextlib.suppress(OSError):  # sys.stdin may be an object without a file descriptor
        os.set_blocking(pipe.fileno(), False)
    n = sum(bool(line.strip()) for line in (pipe.read() or b"").splitlines())
    at_least = "at least " if pipe.read() is None else ""  # None means that the writer has not closed the pipe
    with contextlib.suppress(OSError):
        os.set_blocking(pipe.fileno(), True)
    if n:
        print_note(f"Lines on standard input that were not read: {at_least}{n}.")
