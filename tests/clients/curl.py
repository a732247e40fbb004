"""curl, as the how-to calls it: inference with attention, a stream of events, a refusal with its reason."""

from __future__ import annotations

import argparse
import json
import subprocess


def main() -> None:
    """Check all of it. Raises AssertionError."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rest", type=int, required=True)
    address = f"http://127.0.0.1:{parser.parse_known_args()[0].rest}/v1/models/tiny:infer"
    body = {"sequences": ["the cat sat on a mat"], "attention": {"layers": [-1], "head_reduction": "mean"}}
    answer = json.loads(curl(address, body))
    [result] = answer["results"]
    assert result["attention"]["maps"][0]["weights"]["shape"] == [1, 8, 8]
    many = {"sequences": ["the cat", "a dog", "the mat"], "outputs": ["embedding"]}
    events = curl(address, many, "--no-buffer", "--header", "accept: text/event-stream")
    assert events.count("event: result") == 3, events
    assert events.rstrip().endswith('data: {"sequences":3}')
    refused = json.loads(curl(address, {"sequences": ["the cat"], "attention": {"layers": [9]}}))
    assert (refused["status"], refused["reason"]) == (400, "INVALID_REQUEST")
    print("curl: inference with attention, events, and a refusal")


def curl(address: str, body: object, *flags: str) -> str:
    """Send JSON; return the answer's body."""
    line = ["curl", "--silent", "--show-error", "--max-time", "30", *flags, "--json", json.dumps(body), address]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


main()
