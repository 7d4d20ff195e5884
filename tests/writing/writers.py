"""Authors that answer from a table, and stages around them."""

import json
import os
import signal
import time

from mmkd.data.samples import ImageRef, Question, Sample, Turn
from mmkd.errors import DataError
from mmkd.writing.authors import Author, Said
from mmkd.writing.spec import WriteSpec
from mmkd.writing.stage import WriteStage, prepare


class TableAuthor(Author):
    """Answers what `say` says of a request; counts what it is asked in a file, which several processes may share."""

    def __init__(self, say, name="teacher", log=None, key="k", kill_after=None, wait=0.0):
        self.name, self.model, self.key = name, f"model of {name}", key
        self.say, self.log, self.kill_after, self.wait = say, log, kill_after, wait
        self.asked = []

    def answers(self, requests):
        for request in requests:
            if self.kill_after is not None and len(self.asked) >= self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.asked.append(request.id)
            if self.log is not None:
                with self.log.open("a") as stream:
                    stream.write(json.dumps([os.getpid(), request.id, request.number]) + "\n")
            time.sleep(self.wait)
            said = self.say(request)
            yield request, said if isinstance(said, Said) else Said(text=said)


def samples_of(count, folder=None, pictures=1):
    """Questions, each on one of some pictures."""
    refs = [ImageRef(folder, f"{n}.png") for n in range(pictures)] if folder is not None else []
    found = []
    for n in range(count):
        images = (refs[n % pictures],) if refs else ()
        question = Question(f"s{n}", f"what is number {n}?", images=images, answer=str(n), references=(str(n),))
        turns = (Turn("user", question.question, len(images)), Turn("assistant", "yes"))
        found.append(Sample(question.id, images, turns, {"question": question}))
    return found


def stage_of(samples, authors, /, judges=None, around=None, context=None, **keys):
    keys = {"prompt": {"prompt": "Q: {{ question }}"}, **keys}
    spec = WriteSpec(kind="write", by=[one.name for one in authors], data=[{"format": "jsonl", "root": "."}], **keys)
    more = {"around": around} if around is not None else {}
    stage = WriteStage(
        "ask", spec, lambda: iter(samples), authors, judges or {}, context=context or {}, state=len(samples), **more
    )
    if wrong := prepare(stage):
        raise DataError("; ".join(wrong))
    return stage


def rows_in(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def facts_in(folder):
    return json.loads((folder / "facts.json").read_text())
