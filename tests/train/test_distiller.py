"""The distiller: every term against a plain float64 computation on whole logits, and what must not change a loss."""

from dataclasses import replace

import pytest
import torch
from tiny import VISIONS, make_term, tiny_samples, tiny_tokenizer, tiny_tower
from tokenizers import Tokenizer
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from mmkd.engine.positions import COUNTS
from mmkd.errors import DataError, ImageError, TowerError
from mmkd.teachers.live import LiveTeacher
from mmkd.terms.term import Schedule
from mmkd.towers.assemble import CHAT_TEMPLATES, train_tokenizer
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.skips import Skip

TOKENIZER = tiny_tokenizer()


def term(kind, positions="response", path="student", weight=1.0, **options):
    bridge = options.pop("bridge", False)
    name = f"{kind}_{positions}_{path}"
    return make_term(name, kind, Schedule(weight, weight), positions, path, bridge, tuple(options.items()))


def towers(dtype=torch.float32, **teacher):
    student = tiny_tower(1, 16, tokenizer=TOKENIZER)
    tutor = tiny_tower(2, 32, tokenizer=TOKENIZER, **teacher)
    student.model.to(dtype)
    tutor.model.to(dtype)
    return student, tutor


def batch_of(student, teacher, samples, terms):
    dataset = PairDataset(samples, student, teacher, terms)
    return Collator(student, teacher)([dataset[i] for i in range(len(samples))])["batch"]


def loss_of(student, teacher, samples, terms, counts=None, chunk_bytes=2**20):
    distiller = Distiller(student, teacher, terms, chunk_bytes=chunk_bytes)
    torch.manual_seed(0)
    for p in distiller.extras.parameters():
        torch.nn.init.normal_(p, std=0.2)
    batch = batch_of(student, teacher, samples, terms)
    distiller.zero_grad()
    loss, log = distiller(batch, counts)
    loss.backward()
    return loss, log, batch, distiller


def plain(tower, inputs):
    """All logits of a tower the ordinary way, pixels in, in float64."""
    out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels)
    return out.logits.double()  # [B, L, V]


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_row_terms_equal_a_plain_computation(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3, text_only=1)
    terms = [term("cross_entropy"), term("forward_kl", weight=2.0), term("forward_kl", "visual", weight=0.5), term("reverse_kl")]
    loss, log, batch, _ = loss_of(student, teacher, samples, terms)
    zs, zt = plain(student, batch.student), plain(teacher, batch.teacher)
    response, visual = batch.student.response, batch.student.visual
    expected = {
        "cross_entropy_response_student": F.cross_entropy(zs[response], batch.student.targets[response]),
        "forward_kl_response_student": kl(zt[response], zs[response]).mean(),
        "forward_kl_visual_student": kl(zt[visual], zs[visual]).mean(),
        "reverse_kl_response_student": kl(zs[response], zt[response]).mean(),
    }
    for name, value in expected.items():
        total, count = log[name]
        assert (total / count).item() == pytest.approx(value.item(), rel=1e-5), name
    weights = [1.0, 2.0, 0.5, 1.0]
    assert loss.item() == pytest.approx(sum(w * v.item() for w, v in zip(weights, expected.values(), strict=True)), rel=1e-5)


def test_prompt_rows_predict_the_text_of_the_prompt(tmp_path):
    """Every text token that the template writes before an answer is predicted once; no picture, answer or padding."""
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3, text_only=1)
    terms = [term("cross_entropy"), term("cross_entropy", "prompt", weight=0.5), term("forward_kl", "prompt")]
    loss, log, batch, _ = loss_of(student, teacher, samples, terms)
    inputs = batch.student
    zs, zt = plain(student, inputs), plain(teacher, batch.teacher)
    own, other, wanted = [], [], []
    for b in range(len(samples)):
        for place in range(1, int(inputs.attention_mask[b].sum())):
            if not inputs.visual[b, place] and inputs.targets[b, place - 1] < 0:
                own.append(zs[b, place - 1]), other.append(zt[b, place - 1]), wanted.append(inputs.input_ids[b, place])
    text = TOKENIZER.decode([int(i) for i in wanted])
    assert all(s.turns[0].text in text for s in samples)
    assert int(inputs.prompt.sum()) == len(wanted)
    prompt = F.cross_entropy(torch.stack(own), torch.stack(wanted))
    divergence = kl(torch.stack(other), torch.stack(own)).mean()
    answer = F.cross_entropy(zs[inputs.response], inputs.targets[inputs.response])
    total, count = log["cross_entropy_prompt_student"]
    assert (total / count).item() == pytest.approx(prompt.item(), rel=1e-5)
    assert loss.item() == pytest.approx((answer + 0.5 * prompt + divergence).item(), rel=1e-5)


def test_prompts_compared_with_a_teacher_must_be_the_same_tokens(tmp_path):
    student, teacher = towers(chat_template="<|system|>" + CHAT_TEMPLATES["simple"])
    samples = tiny_samples(tmp_path, 2)
    batch_of(student, teacher, samples, [term("forward_kl"), term("cross_entropy", "prompt")])
    with pytest.raises(DataError, match="need the same chat template"):
        batch_of(student, teacher, samples, [term("forward_kl", "prompt")])


def test_gradients_equal_autograd_on_whole_logits(tmp_path):
    student, teacher = towers(torch.float64)
    samples = tiny_samples(tmp_path, 3)
    terms = [term("cross_entropy"), term("forward_kl"), term("forward_kl", "visual")]
    _, _, batch, _ = loss_of(student, teacher, samples, terms, chunk_bytes=2**16)
    ours = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad()
    zs, zt = plain(student, batch.student), plain(teacher, batch.teacher).detach()
    response, visual = batch.student.response, batch.student.visual
    value = F.cross_entropy(zs[response], batch.student.targets[response]) + kl(zt[response], zs[response]).mean()
    (value + kl(zt[visual], zs[visual]).mean()).backward()
    theirs = {n: p.grad for n, p in student.model.named_parameters() if p.grad is not None}
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_relation_is_the_cosine_of_logit_gram_matrices_per_image(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 2, two_images=1)
    loss, _, batch, _ = loss_of(student, teacher, samples, [term("relation")])
    zs, zt = plain(student, batch.student), plain(teacher, batch.teacher)
    values = []
    for b, images in enumerate(batch.student.images):
        ys, yt = (z[b][x.visual[b]].chunk(images) for z, x in ((zs, batch.student), (zt, batch.teacher)))
        for own, other in zip(ys, yt, strict=True):
            rs, rt = (own @ own.T).flatten(), (other @ other.T).flatten()
            values.append(1 - F.cosine_similarity(rs, rt, dim=0))
    assert len(values) == 4
    assert loss.item() == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


def test_switch_reads_the_students_features_through_the_teacher(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3, text_only=1)
    loss, log, batch, _ = loss_of(student, teacher, samples, [term("forward_kl", path="switch")])
    pictured = batch.teacher.response & torch.tensor([n > 0 for n in batch.teacher.images])[:, None]
    zt = plain(teacher, batch.teacher)[pictured]
    tokens = teacher.project(student.see(batch.student).features)
    hidden = teacher.read(batch.switch, tokens)
    zw = teacher.head(hidden)[batch.switch.response].double()
    assert loss.item() == pytest.approx(float(kl(zt, zw).mean()), rel=1e-5)
    touched = {n for n, p in student.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all("vision_tower" in name for name in touched)
    assert all(p.grad is None for p in teacher.model.parameters())
    assert int(log["forward_kl_response_switch"][1]) == int(pictured.sum()) < int(batch.student.response.sum())


def test_switch_with_another_number_of_visual_tokens(tmp_path):
    """The teacher reads as many visual positions as the student's encoder gives."""
    student = tiny_tower(1, 16, tokenizer=TOKENIZER)
    finer = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = tiny_tower(2, 32, tokenizer=TOKENIZER, vision={**finer, "image_size": 32, "patch_size": 8}, image_size=(32, 32))
    samples = tiny_samples(tmp_path, 2, two_images=1)
    loss, _, batch, _ = loss_of(student, teacher, samples, [term("dbild", path="switch"), term("cross_entropy")])
    assert batch.teacher.visual.sum(1).tolist() == [16, 16, 32]
    assert batch.switch.visual.sum(1).tolist() == batch.student.visual.sum(1).tolist() == [4, 4, 8]
    assert torch.isfinite(loss)
    with pytest.raises(DataError, match="4 visual tokens in the student and 16 in the teacher"):
        loss_of(student, teacher, samples, [term("forward_kl", "visual")])


def test_switch_between_encoders_of_other_width_needs_an_explicit_bridge(tmp_path):
    student = tiny_tower(1, 16, tokenizer=TOKENIZER)
    wide = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = tiny_tower(2, 16, tokenizer=TOKENIZER, vision={**wide, "image_size": 16, "patch_size": 8})
    samples = tiny_samples(tmp_path, 2)
    with pytest.raises(TowerError, match="width 16 do not fit the projector of this tower, which reads 32"):
        loss_of(student, teacher, samples, [term("dbild", path="switch")])
    _, _, _, distiller = loss_of(student, teacher, samples, [term("forward_kl", path="switch", bridge=True)])
    bridge = distiller.extras["forward_kl_response_switch"]
    assert bridge.linear.weight.grad.abs().sum() > 0


def test_feature_match_crosses_widths_and_token_counts(tmp_path):
    student = tiny_tower(1, 16, tokenizer=TOKENIZER)
    wide = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = tiny_tower(2, 16, tokenizer=TOKENIZER, vision={**wide, "image_size": 32, "patch_size": 8}, image_size=(32, 32))
    loss, _, _, distiller = loss_of(student, teacher, tiny_samples(tmp_path, 2), [term("feature_match")])
    assert 0 < float(loss) < 2
    bridge = distiller.extras["feature_match_response_student"]
    assert bridge.linear.weight.shape == (32, 16) and bridge.linear.weight.grad.abs().sum() > 0
    assert not any("language_model" in n for n, p in student.model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("kinds", [["cross_entropy", "forward_kl"], ["relation", "dbild"], ["feature_match", "jsd"]])
def test_two_micro_batches_are_one_batch(tmp_path, kinds):
    student, teacher = towers(torch.float64)
    samples = tiny_samples(tmp_path, 3, text_only=2, two_images=1)
    terms = [term(kind) for kind in kinds] + [term("forward_kl", path="switch")]
    loss, _, batch, _ = loss_of(student, teacher, samples, terms)
    whole = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    parts = [samples[:2] + samples[4:5], samples[2:4] + samples[5:]]
    total, summed = 0.0, {}
    for part in parts:
        value, _, _, _ = loss_of(student, teacher, part, terms, counts=batch.counts)
        total += float(value)
        for name, p in student.model.named_parameters():
            if p.grad is not None:
                summed[name] = summed.get(name, 0) + p.grad
    assert total == pytest.approx(float(loss), rel=1e-9)
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_padding_and_order_change_nothing(tmp_path):
    student, teacher = towers(torch.float64)
    samples = tiny_samples(tmp_path, 4)
    terms = [term("cross_entropy"), term("forward_kl"), term("relation"), term("forward_kl", path="switch")]
    loss, _, batch, _ = loss_of(student, teacher, samples, terms)
    again, _, _, _ = loss_of(student, teacher, samples[::-1], terms)
    alone = sum(float(loss_of(student, teacher, [s], terms, counts=batch.counts)[0]) for s in samples)  # no padding at all
    assert again.item() == pytest.approx(float(loss), rel=1e-9)
    assert alone == pytest.approx(float(loss), rel=1e-9)


def test_padded_vocabularies_just_work(tmp_path):
    """Head rows behind the tokenizer's length are padding: whatever they hold, the loss is the same."""
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 2)
    terms = [term("forward_kl"), term("dbild"), term("relation")]
    before = float(loss_of(student, teacher, samples, terms)[0])
    teacher.model.resize_token_embeddings(len(TOKENIZER) + 20)
    with torch.no_grad():
        teacher.head.weight[len(TOKENIZER) :] = 50.0
    teacher.__dict__.pop("_grams", None)
    assert float(loss_of(student, teacher, samples, terms)[0]) == pytest.approx(before, rel=1e-5)


def test_other_tokenizers_are_refused(tmp_path):
    student = tiny_tower(1, 16, tokenizer=TOKENIZER)
    teacher = tiny_tower(2, 16, tokenizer=train_tokenizer(["quite other words"] * 9, 300))
    with pytest.raises(TowerError, match="have another id or none in the other tokenizer"):
        loss_of(student, teacher, tiny_samples(tmp_path, 3), [term("forward_kl")])


def test_a_token_added_to_one_tokenizer_is_no_obstacle(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<box>"]})
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 16, tokenizer=tokenizer)
    assert torch.isfinite(loss_of(student, teacher, tiny_samples(tmp_path, 2), [term("forward_kl")])[0])


def test_the_place_of_a_picture_may_have_another_id(tmp_path):
    """A student on LLaVA-OneVision's language model gets `<image>` behind its words; OneVision has it among them."""
    raw = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str().replace('"<image>"', '"<|object|>"'))
    ends = {name: getattr(TOKENIZER, name) for name in ("eos_token", "pad_token")}
    student = tiny_tower(1, 16, tokenizer=PreTrainedTokenizerFast(tokenizer_object=raw, **ends))
    teacher = tiny_tower(2, 16, tokenizer=TOKENIZER)
    assert student.image_token_id != teacher.image_token_id
    assert torch.isfinite(loss_of(student, teacher, tiny_samples(tmp_path, 2), [term("forward_kl")])[0])


def test_the_teacher_is_not_part_of_the_module():
    student, teacher = towers()
    distiller = Distiller(student, teacher, [term("forward_kl")])
    names = {n for n, _ in distiller.named_parameters()}
    assert names == {f"student.{n}" for n, _ in student.model.named_parameters()}
    assert not any(p.requires_grad for p in teacher.model.parameters())
    distiller.train()
    assert not teacher.model.training


def test_frozen_parts_stay_in_evaluation_mode():
    student, teacher = towers()
    distiller = Distiller(student, teacher, [term("forward_kl")])
    student.vision.requires_grad_(False)
    distiller.train()
    assert not student.vision.training and student.language.training


def test_text_only_batch_reaches_every_trained_parameter(tmp_path):
    """Data-parallel training waits for the gradient of each parameter, also where no picture was seen."""
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 0, text_only=3)
    loss, log, batch, _ = loss_of(student, teacher, samples, [term("cross_entropy"), term("forward_kl", path="switch")])
    assert batch.switch is None and float(batch.counts[COUNTS.index("image")]) == 0
    assert "forward_kl_response_switch" not in log
    assert all(p.grad is not None for p in student.model.parameters())
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", ["contrastive", "tags"])
def test_pretraining_terms_learn_which_words_belong_to_a_picture(tmp_path, kind):
    student, _ = towers()
    samples = tiny_samples(tmp_path, 6)
    terms = [term(kind)]
    distiller = Distiller(student, None, terms)
    batch = batch_of(student, None, samples, terms)
    optimiser = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        loss, _ = distiller(batch)
        first = float(loss) if first is None else first
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) < 0.3 * first


def test_scheduled_weight():
    schedule = Schedule(0.0, 2.0, over=0.5)
    assert [schedule.at(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 1.0, 2.0, 2.0]


def test_unreadable_pictures_are_counted_and_limited(tmp_path):
    student, _ = towers()
    samples = tiny_samples(tmp_path, 4)
    for sample in samples[:2]:
        (tmp_path / sample.images[0].name).write_bytes(b"not a picture")
    dataset = PairDataset(samples, student, None, [term("cross_entropy")], max_skipped=1)
    assert isinstance(dataset[0], Skip) and isinstance(dataset[0], Skip) and len(dataset.skips) == 1
    batch = Collator(student, None)([dataset[0], dataset[2]])["batch"]
    assert batch.student.ids == [samples[2].id]
    with pytest.raises(DataError, match="2 of 4 training samples cannot be used, more than the 1") as error:
        dataset[1]
    assert not isinstance(error.value, ImageError)


# ---- options of the specifications -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["answer", "text", "all"])
def test_other_positions_equal_a_plain_computation(tmp_path, positions):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3, text_only=1, two_images=1)
    loss, log, batch, _ = loss_of(student, teacher, samples, [term("forward_kl", positions)])
    zs, zt = plain(student, batch.student), plain(teacher, batch.teacher)
    values = {"answer": [], "text": [], "all": []}
    for b, places in enumerate(batch.student.attention_mask.sum(1).tolist()):
        for t in range(places):
            value = kl(zt[b, t], zs[b, t])
            values["all"].append(value)
            if t > 0 and batch.student.targets[b, t - 1] >= 0:
                values["answer"].append(value)
            if t + 1 < places and not batch.student.visual[b, t + 1]:
                values["text"].append(value)
    expected = torch.stack(values[positions])
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert int(log[f"forward_kl_{positions}_student"][1]) == len(expected)


def test_M1_the_unshifted_mask_is_one_row_late(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3)
    shifted = loss_of(student, teacher, samples, [term("forward_kl")])[0]
    late, _, batch, _ = loss_of(student, teacher, samples, [term("forward_kl", "answer")])
    assert late.item() != pytest.approx(shifted.item(), rel=1e-3)
    assert torch.equal(batch.student.answer[:, 1:], batch.student.response[:, :-1])


def test_sum_over_a_samples_rows(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3, text_only=1)
    by_row = [term("forward_kl"), term("forward_kl", path="switch")]
    mean, _, batch, _ = loss_of(student, teacher, samples, by_row)
    rows, switched = float(batch.student.response.sum()), float(batch.counts[COUNTS.index("switch")])
    parts = [float(loss_of(student, teacher, samples, [t])[0]) for t in by_row]
    summed, _, _, _ = loss_of(student, teacher, samples, [replace(t, place=replace(t.place, reduction="sum")) for t in by_row])
    assert summed.item() == pytest.approx(parts[0] * rows / 4 + parts[1] * switched / 3, rel=1e-5)
    assert mean.item() == pytest.approx(sum(parts), rel=1e-5)


def test_relation_of_hidden_states(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 2, two_images=1)
    loss, _, batch, _ = loss_of(student, teacher, samples, [term("relation", source="hidden")])
    values = []
    for b, images in enumerate(batch.student.images):
        each = []
        for tower, inputs in ((student, batch.student), (teacher, batch.teacher)):
            out = tower.base(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels)
            each.append(out.last_hidden_state[b][inputs.visual[b]].double().chunk(images))
        values += [1 - F.cosine_similarity((y @ y.T).flatten(), (x @ x.T).flatten(), dim=0) for y, x in zip(*each, strict=True)]
    assert loss.item() == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)
    assert loss.item() != pytest.approx(float(loss_of(student, teacher, samples, [term("relation")])[0]), rel=1e-2)


class LargestLogits(TorchDispatchMode):
    """The most rows of any tensor with a column for each token, whatever makes it, forward or backward."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


def test_llava_kd_makes_no_logits_of_all_visual_rows(tmp_path):
    """MDist at response and visual rows and RDist of several images a sample, where [N, V] alone would burst the budget."""
    fine = {"vision": VISIONS["vit"] | {"image_size": 64}, "image_size": (64, 64), "tokenizer": TOKENIZER}
    student, teacher = tiny_tower(1, 16, **fine), tiny_tower(2, 32, **fine)
    samples = tiny_samples(tmp_path, 1, two_images=2, text_only=1)
    terms = [term("cross_entropy"), term("forward_kl"), term("forward_kl", "visual"), term("relation", weight=0.5)]
    vocabulary, budget = len(TOKENIZER), 2**18
    with LargestLogits(vocabulary) as largest:
        loss, log, batch, _ = loss_of(student, teacher, samples, terms, chunk_bytes=budget)
    assert batch.student.visual.sum(1).tolist() == [64, 128, 128, 0] and int(log["relation_response_student"][1]) == 5
    chunk = budget // 2 // (2 * 4 * vocabulary)  # half the budget holds both towers' logits of a chunk
    assert 32 < largest.rows <= chunk < 64, "not even one image's logits are ever there (32 rows are the teacher's head)"
    with LargestLogits(vocabulary) as naive:
        plain(student, batch.student)
    assert naive.rows == batch.student.input_ids.numel() > 320
    whole = loss_of(student, teacher, samples, terms, chunk_bytes=2**28)[0]
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)


def frozen_pair(tmp_path):
    """Towers of one encoder, which is frozen in the student; their projectors and language models differ."""
    student, teacher = towers()
    student.vision.load_state_dict(teacher.vision.state_dict())
    student.vision.requires_grad_(False)
    return student, teacher, tiny_samples(tmp_path, 3, text_only=1)


def test_a_frozen_encoder_in_common_runs_once(tmp_path):
    student, teacher, samples = frozen_pair(tmp_path)
    terms = [term("cross_entropy"), term("forward_kl"), term("feature_match")]
    distiller = Distiller(student, teacher, terms)
    batch = batch_of(student, teacher, samples, terms)
    looks = []
    teacher.vision.register_forward_hook(lambda *_: looks.append(1))
    first, _ = distiller(batch)
    compared = len(looks)
    again, log = distiller(batch)
    again.backward()
    assert len(looks) == compared, "the teacher's encoder ran beside the student's"
    distiller.teachers["teacher"]._sees_alike = False
    apart, _ = distiller(batch)
    assert len(looks) == compared + 1
    assert first.item() == pytest.approx(apart.item(), rel=1e-6) == again.item()
    assert float(log["feature_match_response_student"][0]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("change", ["trained", "other weights"])
def test_an_encoder_that_differs_or_learns_runs_for_both(tmp_path, change):
    student, teacher, samples = frozen_pair(tmp_path)
    if change == "trained":
        student.vision.requires_grad_(True)
    else:
        next(student.vision.parameters()).data.add_(1e-3)
    terms = [term("forward_kl")]
    distiller = Distiller(student, teacher, terms)
    looks = []
    teacher.vision.register_forward_hook(lambda *_: looks.append(1))
    for number in (1, 2):
        distiller(batch_of(student, teacher, samples, terms))
        assert len(looks) == number


@pytest.mark.parametrize("positions", ["response", "prompt", "text", "visual", "all"])
def test_the_switch_at_other_positions(tmp_path, positions):
    student, teacher = towers(chat_template="<|system|>" + CHAT_TEMPLATES["simple"])  # its prompts need not be the student's
    samples = tiny_samples(tmp_path, 2, text_only=1)
    if positions == "all":
        teacher = towers()[1]
    half = term("forward_kl", path="switch", weight=0.5)
    half = replace(half, place=replace(half.place, name="half"))
    loss, log, batch, _ = loss_of(student, teacher, samples, [term("forward_kl", positions, "switch"), half])
    zt = plain(teacher, batch.teacher)
    zw = teacher.head(teacher.read(batch.switch, teacher.project(student.see(batch.student).features))).double()
    values = {"visual": [], "prompt": [], "response": [], "all": []}
    for b, places in enumerate(batch.switch.attention_mask.sum(1).tolist()):  # pictured samples come first here
        for t in range(places):
            value = kl(zt[b, t], zw[b, t])
            values["all"].append(value)
            if batch.switch.visual[b, t]:
                values["visual"].append(value)
            if t + 1 < places and not batch.switch.visual[b, t + 1]:
                values["response" if batch.switch.targets[b, t] >= 0 else "prompt"].append(value)
    values["text"] = values["prompt"] + values["response"]
    mean = {name: torch.stack(found).mean().item() for name, found in values.items()}
    assert loss.item() == pytest.approx(mean[positions] + 0.5 * mean["response"], rel=1e-5)
    assert int(log[f"forward_kl_{positions}_switch"][1]) == len(values[positions])


def test_two_teachers_give_the_sum_of_two_runs_with_one(tmp_path):
    """A term each, on rows, pictures and features; gradients in float64 are the sum of those with one teacher at a time."""
    student, first = towers(torch.float64)
    second = tiny_tower(5, 24, tokenizer=TOKENIZER)
    second.model.to(torch.float64)
    samples = tiny_samples(tmp_path, 3, text_only=1)
    teachers = {"first": LiveTeacher(first, "first"), "second": LiveTeacher(second, "second")}

    kinds = (("forward_kl", "response", 1.0), ("reverse_kl", "visual", 0.5), ("relation", "visual", 2.0))

    def terms_with(name):
        return [
            make_term(f"{kind}_{name}", kind, Schedule(weight, weight), positions, teacher=name)
            for kind, positions, weight in kinds
        ]

    def gradients(teachers, terms):
        student.model.zero_grad()
        loss, log, _, _ = loss_of(student, teachers, samples, terms)
        return loss.item(), {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}, log

    both, together, log = gradients(teachers, [*terms_with("first"), *terms_with("second")])
    alone = [gradients({name: teachers[name]}, terms_with(name)) for name in teachers]
    assert both == pytest.approx(sum(loss for loss, _, _ in alone), rel=1e-12)
    assert {name for _, _, part in alone for name in part} == set(log)
    assert float(log["forward_kl_first"][0]) != pytest.approx(float(log["forward_kl_second"][0]))
    # Llama's norms compute in float32, also on the way back; a key's bias has no gradient but rounding.
    atol = 1e-7 * max(float(gradient.abs().max()) for gradient in together.values())
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(part[name] for _, part, _ in alone), rtol=1e-6, atol=atol, msg=name)
