"""The `kvcascade` command: finds the subcommand, and turns what the user can mend into one line and status 2."""

import contextlib
import difflib
import importlib
import importlib.metadata
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator

COMMANDS = {
    "study": "train MHA, retrain GQA, evaluate the caches, write a report",
    "train": "train a GPT, or go on with a run",
    "convert": "pool a run's KV heads, ready for uptraining",
    "quantize": "round a model's weights to four bits, and measure what that costs",
    "calibrate": "moments of a model's queries, keys and values, for codecs in a basis of its own",
    "rank": "train a ranker of tokens, for the policy `learned`",
    "distill": "train a small model that foresees a large one, for `--speculate draft:FILE`",
    "evaluate": "perplexity, bytes and speed of a model behind caches",
    "codecs": "what codecs do to keys, values and what attention makes of them",
    "tune": "the best cache of so many bytes, by layer and head, for a model and a text",
    "leaderboard": "everything known, by what it loses at so many bytes",
    "bench": "prefill and decode speed, and the share of the memory bandwidth",
    "stream": "decode on and on: whether time and memory per token stay flat",
    "speculate": "what it gains to compute tokens that are only foreseen, on copying, JSON and summaries",
    "simulate": "serve a trace of requests: latency, throughput, waste, what prefixes were found",
    "memory": "bytes of models and caches by arithmetic, and the users that leaves room for",
    "methods": "every policy: what it keeps, whose it is, what it reads and takes",
    "fit": "how many users fit on a GPU, compiled for it without one",
    "crash": "how many users fit: more and more under a hard limit of memory, until one is killed",
    "prompt": "the memory that a prompt takes, at once and in parts",
    "parity": "each method beside kvpress' version of it: the same weights, windows and tokens kept",
    "profile": "where a decode step spends time and bytes, and how memory grows with the context",
    "kernels": "what the GPU kernels cost on a card, without one; their speed, with one",
    "compare": "runs side by side: loss, perplexity, bytes, latency",
    "retrieve": "what a cache still lets a model find: needles, copying, arithmetic, several questions",
    "harness": "standard tasks, through EleutherAI's lm-evaluation-harness: perplexity, choices, answers",
    "report": "a page of what was recorded",
    "generate": "continue a prompt through a cache",
    "watch": "a page that shows tokens sink from tier to tier",
    "serve": "answer OpenAI's clients over HTTP",
    "completion": "what a shell needs to complete commands",
}

COLD = ("bench", "compare", "simulate", "study")
"""They report how long compiling takes."""


def main(arguments: list[str] | None = None) -> None:
    """Run `kvcascade COMMAND …`; exits with 0, with 2 for bad input, 1 for diverged training, 128 + n when stopped by signal n."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale may have no letter for what is said
    try:
        with _second_interrupt_ends():
            _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as stopped:
        _fail(str(stopped) or "stopped", 128 + getattr(stopped, "signal", 2))


@contextlib.contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """Let a second Ctrl-C end the process within a second, also from within a compilation, while Python is told of no signal."""
    if threading.current_thread() is not threading.main_thread():  # whoever started it deals with signals
        yield
        return
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def listen() -> None:
        heard = 0
        with open(ear, "rb", buffering=0) as pipe:
            while heard < 2 and (numbers := pipe.read(64)):
                heard += numbers.count(signal.SIGINT)
        if heard >= 2:
            time.sleep(1)  # in which Python ends by itself where it can
            cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar hides it
            os.write(2, f"{cursor}kvcascade: stopped\n".encode())
            os._exit(130)

    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(mouth)


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(
            "usage: kvcascade COMMAND [--help] …\n\nWhich keys and values should a transformer keep, how precisely, and where?\n"
        )
        print("\n".join(f"  {name:11} {what}" for name, what in COMMANDS.items()))
        sys.exit(0)
    if command in ("-V", "--version"):
        print(f"kvcascade {importlib.metadata.version('kvcascade')}")
        sys.exit(0)
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
        _fail(f"no command {command!r}; {hint}")
    sys.unraisablehook = _unraisable
    logging.basicConfig(format="kvcascade: %(message)s", level=logging.ERROR)
    logging.getLogger("kvcascade").setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, to developers
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes about this machine are not about the user's work
    if command == "harness":
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars, beside the command's own
    if command not in COLD:
        keep_programs()
    script = importlib.import_module(f"kvcascade.scripts.{command}")
    from kvcascade.cache.errors import BadInput
    from kvcascade.train.errors import Diverged, Interrupted

    try:
        script.main(arguments[1:])
    except BadInput as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except Diverged as error:
        _fail(str(error), 1)
    except Interrupted as error:
        _fail(str(error), 128 + error.signal)
    except MemoryError:
        _fail("there is not enough memory")
    except Exception as error:
        if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(f"there is not enough memory: {str(error).splitlines()[0]}")


def keep_programs() -> None:
    """Let JAX, which is yet to be imported, keep compiled programs in the user's cache, up to a GiB; its own variables say otherwise."""
    from kvcascade.kernels.files import cache_dir

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "programs"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _unraisable(event, others=sys.unraisablehook) -> None:
    """When one write of a checkpoint fails, orbax closes the event loop that the others report to: that is no news to the user."""
    if not (isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"):
        others(event)


def _fail(message: str, status: int = 2) -> None:
    print(f"kvcascade: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
