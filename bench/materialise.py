"""A data version fetched by `dvc pull` and by this package, side by side from one S3 server on this machine.

    python bench/materialise.py --files 6000 --rounds 5 --output build/bench

Both start cold, as whole processes, in turns: a fresh clone with an empty DVC cache, an empty cache of ours. The server
shares the cores with them.
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from braintumor.artifacts import write_json
from braintumor.data.contents import dataset_md5
from braintumor.object_store import open_store

KEY, SECRET = "bench", "bench-secret"
ADDRESS = "s3://bench/dvc"
MEAN_BYTES = 20_000
OPEN = "import sys; from pathlib import Path; from braintumor.data.dvc_remote import open_dataset; "
OPEN += "print(open_dataset(Path(sys.argv[1])))"


def main() -> None:
    """Time both in turns, and leave the figures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="braintumor-bench-") as name, served(Path(name) / "server") as settings:
        os.environ.update(settings)
        md5 = push(Path(name) / "repository", options.files)
        rounds = []
        for number in range(options.rounds):
            order = (time_dvc_pull, time_materialise) if number % 2 else (time_materialise, time_dvc_pull)
            figures: dict[str, float] = {}
            for timed in order:
                figures |= timed(Path(name), md5)
            figures["ratio"] = figures["dvc_pull_s"] / figures["materialise_s"]
            print("  ".join(f"{name} {value:.2f}" for name, value in sorted(figures.items())), flush=True)
            rounds.append(figures)
    result = {name: spread([figures[name] for figures in rounds]) for name in sorted(rounds[0])}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "materialise.json", {"files": options.files, "cores": os.cpu_count(), **result})
    for name, figures in result.items():
        print(f"{name:20} median {figures['median']:.2f} ({figures['minimum']:.2f} to {figures['maximum']:.2f})")


@contextmanager
def served(folder: Path) -> Iterator[dict[str, str]]:
    """A SeaweedFS server, and the environment that leads there."""
    folder.mkdir()
    identity = {"name": "b", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    command = [
        str(Path(sys.executable).with_name("weed")), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}",
        "-s3", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
        *(f"-{name}.port={port}" for name, port in zip(names, ports[:4], strict=True)),
        *(f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)),
    ]  # fmt: skip
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[3]}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            wait_until_ready(settings, server)
            yield settings
        finally:
            server.kill()


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_until_ready(settings: dict[str, str], server: "subprocess.Popen[bytes]") -> None:
    """The server answers and has the bucket, which it makes with the first object."""
    os.environ.update(settings)
    deadline = time.monotonic() + 60
    while True:
        try:
            open_store("s3://bench").write("ready", b"")
            return
        except Exception:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def push(repository: Path, n_files: int) -> str:
    """The md5 of a version of random files, each about the size of a slice, after `dvc push`."""
    numbers = random.Random(0)
    for index in range(n_files):
        file = repository / f"data/{'train' if index % 8 else 'test'}/glioma/{index:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(numbers.randbytes(numbers.randint(MEAN_BYTES // 2, MEAN_BYTES * 3 // 2)))
    os.environ["DVC_NO_ANALYTICS"] = "1"
    os.environ["DVC_SITE_CACHE_DIR"] = str(repository.parent / "site")
    call(repository, "git", "init", "-q")
    dvc(repository, "init", "-q")
    dvc(repository, "remote", "add", "-q", "-d", "bench", ADDRESS)
    dvc(repository, "add", "-q", "data")
    dvc(repository, "push", "-q")
    call(repository, "git", "add", "-A")
    call(repository, "git", "-c", "user.name=b", "-c", "user.email=b@example.org", "commit", "-q", "-m", "data")
    return dataset_md5(repository / "data")


def time_dvc_pull(folder: Path, md5: str) -> dict[str, float]:
    """Seconds of `dvc pull data.dvc` in a fresh clone."""
    clone = folder / "clone"
    call(folder, "git", "clone", "-q", str(folder / "repository"), str(clone))
    os.environ["DVC_SITE_CACHE_DIR"] = str(folder / "clone-site")
    figures = timed("dvc_pull", lambda: dvc(clone, "pull", "-q", "data.dvc"))
    assert dataset_md5(clone / "data") == md5
    for used in (clone, folder / "clone-site"):
        shutil.rmtree(used, ignore_errors=True)
    return figures


def time_materialise(folder: Path, md5: str) -> dict[str, float]:
    """Seconds until a step would have the version open, and of the next step that opens it."""
    cache = folder / "cache"
    os.environ.update(BRAINTUMOR_DATA_REMOTE=ADDRESS, BRAINTUMOR_CACHE=str(cache))
    figures = timed("materialise", lambda: call(folder, sys.executable, "-c", OPEN, md5))
    figures["reopen_s"] = timed("reopen", lambda: call(folder, sys.executable, "-c", OPEN, md5))["reopen_s"]
    assert dataset_md5(cache / "datasets" / md5) == md5
    shutil.rmtree(cache)
    return figures


def timed(name: str, run: Any) -> dict[str, float]:
    """Wall and CPU seconds of a child process."""
    before, started = os.times(), time.perf_counter()
    run()
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {f"{name}_s": wall, f"{name}_cpu_s": cpu}


def dvc(folder: Path, *arguments: str) -> None:
    """Run DVC of this environment."""
    call(folder, str(Path(sys.executable).with_name("dvc")), *arguments)


def call(folder: Path, *command: str) -> None:
    """Run a command; its failure is ours."""
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def spread(values: list[float]) -> dict[str, float]:
    """The median and the ends."""
    return {
        "median": round(statistics.median(values), 3),
        "minimum": round(min(values), 3),
        "maximum": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
