"""`mmkd push`: a run's student, or a model's folder, to a repository of the hub."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run, whose student is sent, or the folder of a student")
    parser.add_argument("repo", metavar="REPO_ID", help="ORGANISATION/NAME, or NAME of your own; made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent and what is refused; nothing is asked")
    parser.add_argument("--public", action="store_true", help="everybody may see it (default: private)")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.errors import printable
    from mmkd.runs import push

    if not arguments.dry_run:
        print(push.push(arguments.folder, arguments.repo, public=arguments.public))
        return 0
    upload = push.planned(arguments.folder)
    push.check_name(arguments.repo)
    who = "everybody may see it" if arguments.public else "private"
    print(printable("\n".join([*upload.lines(f"{arguments.repo} ({who})")])))
    return 2 if upload.wrong else 0
