"""`python -m polyvec info`: print what this installation is and what it runs on."""

from __future__ import annotations

import argparse

from polyvec import runtime_info


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m polyvec", description="polyvec's command line")
    parser.add_argument("command", choices=["info"], help="info: version, instruction sets, threads, CUDA")
    parser.parse_args()
    info = runtime_info()
    cuda = info.pop("cuda")
    info["isas"] = ", ".join(info["isas"])
    info.update({"cuda": "not built"} if cuda is None else {f"cuda {key}": value for key, value in cuda.items()})
    width = max(map(len, info))
    for key, value in info.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    main()
