"""Train on two hosts, one rank on each, and compare the model with that of two ranks on one host.

The hosts are two network namespaces of this machine, each with its own host name and address. A veth pair, a virtual
cable, is their only connection. Needs Linux, root and iproute2, and says so if they are missing.

python -m benchmarks.two_hosts
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CANNOT_RUN = 77  # exit code
BATCH, STEPS = 16, 60
HOSTS = ("nc-host-a", "nc-host-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
DEVICES = ("nc-veth-a", "nc-veth-b")
PORT = "29577"


def make_inputs(folder: Path) -> None:
    """Write a file of pairs of random words, and an untrained model."""
    from negative_cache.workbench.models import load_model

    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(500)]
    pairs = []
    for _ in range(2 * BATCH * STEPS):
        document = chance.sample(words, 12)
        query = [
            word[::-1] for word in chance.sample(document, 4)
        ]  # other words than the document's, so that there is something to learn
        pairs.append({"query": " ".join(query), "positive": " ".join(document)})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    load_model("static", [text for pair in pairs for text in pair.values()], 0).save_pretrained(str(folder / "model"))


def command(folder: Path, output: str, launch: list[str]) -> list[str]:
    """`torchrun ... -m negative_cache train ...`."""
    given = ["--data", str(folder / "pairs.jsonl"), "--model", str(folder / "model"), "--output", str(folder / output)]
    given += ["--batch-size", str(BATCH), "--max-steps", str(STEPS), "--cache-size", "1024", "--learning-rate", "0.05"]
    given += ["--num-samples", "1"]  # so that every step sends documents of the cache
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launch]
    return [*torchrun, "-m", "negative_cache", "train", *given]


@contextlib.contextmanager
def two_namespaces() -> Iterator[None]:
    """Create two hosts and the cable between them; exits with a message if that fails."""
    if os.name != "posix" or shutil.which("ip") is None or os.geteuid() != 0:
        print("Cannot run: this needs Linux, root and the command `ip` (iproute2).")
        sys.exit(CANNOT_RUN)
    try:
        for host in HOSTS:
            ip(f"netns add {host}")
        ip(f"link add {DEVICES[0]} netns {HOSTS[0]} type veth peer name {DEVICES[1]} netns {HOSTS[1]}")
        for host, device, address in zip(HOSTS, DEVICES, ADDRESSES, strict=True):
            ip(f"-n {host} address add {address}/24 dev {device}")
            ip(f"-n {host} link set lo up")
            ip(f"-n {host} link set {device} up")
        yield
    except subprocess.CalledProcessError as error:
        print(f"Cannot run: `{' '.join(error.cmd)}` failed: {error.stderr.decode().strip()}")
        sys.exit(CANNOT_RUN)
    finally:
        for host in HOSTS:  # this deletes the cable, too
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


def on_host(number: int, command: list[str]) -> list[str]:
    """The command that runs another command on a host."""
    named = ["unshare", "--uts", "sh", "-c", f'hostname {HOSTS[number]} && exec "$@"', "sh", *command]
    return ["ip", "netns", "exec", HOSTS[number], *named]


def train_on_two_hosts(folder: Path) -> int:
    """Run both ranks, and return the bytes that the first host sent."""
    processes = []
    for number in range(2):
        launch = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        launch += ["--master-addr", ADDRESSES[0], "--master-port", PORT]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": DEVICES[number]}
        log = (folder / f"{HOSTS[number]}.log").open("w")
        argv = on_host(number, command(folder, "two-hosts", launch))
        processes.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=300) for process in processes]
    if any(codes):
        for host in HOSTS:
            print((folder / f"{host}.log").read_text(encoding="utf-8"))
        sys.exit(f"The ranks ended with {codes}.")
    statistics = ["ip", "-n", HOSTS[0], "-s", "-j", "link", "show", DEVICES[0]]
    shown = json.loads(subprocess.run(statistics, check=True, capture_output=True).stdout)
    return int(shown[0]["stats64"]["tx"]["bytes"])


def main() -> None:
    with two_namespaces(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("Making pairs and a model ...", flush=True)
        make_inputs(folder)
        print(f"Training on {' and '.join(HOSTS)} ...", flush=True)
        started = time.monotonic()
        sent = train_on_two_hosts(folder)
        print(f"{STEPS} steps in {time.monotonic() - started:.0f} s with start-up; {HOSTS[0]} sent {sent / 1e6:.1f} MB")
        print("Training on one host ...", flush=True)
        launch = ["--standalone", "--nproc-per-node", "2"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command(folder, "one-host", launch), check=True, env=environment, **quiet)  # type: ignore[call-overload]
        models = [(folder / output / "model.safetensors").read_bytes() for output in ("two-hosts", "one-host")]
        records = [json.loads((folder / output / "run.json").read_text()) for output in ("two-hosts", "one-host")]
        two, one = (f"{record['after']['MRR@10']:.4f}" for record in records)
        before = f"{records[0]['before']['MRR@10']:.4f}"
        print(f"Test MRR@10: {two} on two hosts, {one} on one, {before} untrained")
        print(f"The models are {'equal, bit for bit' if models[0] == models[1] else 'NOT equal'}.")
        sys.exit(int(models[0] != models[1]))


if __name__ == "__main__":
    main()
