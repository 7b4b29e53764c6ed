"""For Ray Serve: `serve run kvcascade.scripts.replicas:application model=smollm2 weights=int8 replicas=2`; a minute until it answers."""

from kvcascade.train.run import open_model


def application(about: dict[str, str]):
    """The server's replicas: `model`, and any of `weights`, `cache`, `context`, `blocks`, `rows`, `tokens`, `replicas`, `most`, `cpus`."""
    from kvcascade.serve import replicas

    return replicas.application(open_model, about)
