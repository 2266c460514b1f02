"""PPO: its parts against figures worked out by hand, itself on toys whose optimum is known, then on the tiny Gemma."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from promptrec import ppo, rewards
from promptrec.errors import InputError
from promptrec.methods import Task
from promptrec.profiles import ASSETS, get_profile, override
from promptrec.templates import recovery_request

TOY = ppo.PPOSettings(rows_a_step=64, samples=4, at_once=256, steps=40, epochs=4, beta=0.0)
QUICK = ppo.PPOSettings(rows=4, words=8, samples=2, new_tokens=4, steps=2, rows_a_step=2, at_once=3, rank=2)


class Table(nn.Module):
    """A policy that is a table of logits [length, vocabulary]: `length` tokens, whatever the request."""

    def __init__(self, length: int, vocabulary: int, first: list[float] | None = None, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate
        start = torch.zeros(length, vocabulary) if first is None else torch.tensor([first]).log()
        self.logits, self.values = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(length))
        self.start = start

    def sample(self, batch: int) -> ppo.Rollout:
        answers = torch.distributions.Categorical(logits=self.logits).sample((batch,))
        return ppo.Rollout(answers, torch.ones(answers.shape))

    def _log_probs(self, logits, answers):
        return logits.log_softmax(-1).expand(len(answers), -1, -1).gather(2, answers[..., None])[..., 0]

    def evaluate(self, rollout):
        return self._log_probs(self.logits, rollout.answers), self.values.expand(rollout.answers.shape)

    def reference(self, rollout):
        return self._log_probs(self.start, rollout.answers)

    def groups(self):
        return [{"params": [self.logits], "lr": self.rate}, {"params": [self.values], "lr": 0.1}]


def train_table(policy: Table, reward, **changes) -> list[dict]:
    torch.manual_seed(0)
    settings = override(TOY, **changes)
    batches = [settings.rows_a_step * settings.samples] * settings.steps
    return ppo.ppo(policy, batches, lambda rollout, _: reward(rollout.answers.numpy()), settings)


# ------------------------------------------------------------------------------------------------ parts


def test_advantages_are_those_of_an_example_worked_out_by_hand():
    given, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.5]])
    # errors: 2 - .5 = 1.5; 0 + .9 * .5 - 1 = -.55; 1 + .9 * 1 - .5 = 1.4; then each plus .9 * .8 of the next
    expected = [1.4 + 0.72 * (-0.55 + 0.72 * 1.5), -0.55 + 0.72 * 1.5, 1.5]
    found = ppo.advantages(given, values, torch.ones(1, 3), discount=0.9, smoothing=0.8)
    assert found[0].tolist() == pytest.approx(expected)


def test_advantages_end_where_the_answer_does():
    rng = torch.Generator().manual_seed(0)
    given, values = torch.rand(2, 5, generator=rng), torch.rand(2, 5, generator=rng)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = ppo.advantages(given, values, mask, 0.9, 0.8)
    alone = ppo.advantages(given[:1, :3], values[:1, :3], mask[:1, :3], 0.9, 0.8)
    assert torch.allclose(found[:1, :3], alone) and found[0, 3:].abs().sum() == 0


def test_without_smoothing_an_advantage_is_the_return_less_the_value():
    rng = torch.Generator().manual_seed(1)
    given, values = torch.rand(3, 4, generator=rng), torch.rand(3, 4, generator=rng)
    returns = given.flip(1).cumsum(1).flip(1)
    assert torch.allclose(ppo.advantages(given, values, torch.ones(3, 4), 1.0, 1.0), returns - values, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "gain", "moves"), [(1.5, 1.0, False), (0.5, 1.0, True), (0.5, -1.0, False), (1.5, -1.0, True)]
)
def test_a_gain_beyond_the_clip_has_no_gradient_and_a_loss_keeps_it(ratio, gain, moves):
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss = ppo.clipped_loss(new, torch.zeros(1, 1), gain * one, one, ratio_clip=0.2)
    loss.backward()
    assert (new.grad.item() != 0) is moves
    assert loss.item() == pytest.approx(-min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain))


def test_a_score_less_the_mean_of_the_rows_other_scores():
    assert ppo.less_row_mean(torch.tensor([1.0, 0, 0, 4, 4, 1]), 3).tolist() == [1.0, -0.5, -0.5, 1.5, 1.5, -3.0]


def test_a_token_pays_for_straying_and_the_last_one_earns_the_score():
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    found = ppo.token_rewards(torch.tensor([2.0, 3.0]), torch.tensor([[1.0, 2, 9], [0, 1, 1]]), mask, beta=0.1)
    assert torch.allclose(found, torch.tensor([[-0.1, 1.8, 0.0], [0.0, -0.1, 2.9]]))


def test_batches_hold_every_row_equally_often():
    rows = pd.DataFrame({"id": range(5)})
    drawn = [batch["id"].tolist() for batch in ppo.batches_of(rows, override(QUICK, steps=5, rows_a_step=3))]
    assert [len(batch) for batch in drawn] == [3] * 5
    assert sorted(row for one in drawn for row in one) == sorted([0, 1, 2, 3, 4] * 3)


# ------------------------------------------------------------------------------------------------ toys


def test_it_finds_the_best_of_six_tokens():
    worth = np.array([0.1, 0.3, 0.2, 0.9, 0.5, 0.0])
    policy = Table(1, 6)
    history = train_table(policy, lambda answers: worth[answers[:, 0]])
    assert policy.logits.softmax(-1)[0, 3] > 0.95
    assert history[0]["high"] < 0.5 < 0.8 < history[-1]["low"]
    assert [point["step"] for point in history] == list(range(1, 41))


def test_a_reward_for_two_tokens_together_reaches_the_first_one():
    policy = Table(2, 4)
    train_table(policy, lambda answers: ((answers[:, 0] == 1) & (answers[:, 1] == 2)).astype(float), steps=60)
    assert policy.logits.softmax(-1)[[0, 1], [1, 2]].min() > 0.9
    assert policy.values[1].item() == pytest.approx(1.0, abs=0.15)


def test_with_a_penalty_it_ends_at_the_optimum_known_in_closed_form():
    """max E[r] - beta KL(p | q) is solved by p = q exp(r / beta) / Z."""
    worth, first, beta = torch.tensor([1.0, 0.5, 0.0]), [0.2, 0.3, 0.5], 0.5
    policy = Table(1, 3, first, rate=0.01)
    train_table(policy, lambda answers: worth.numpy()[answers[:, 0]], beta=beta, steps=60)
    expected = (torch.tensor(first).log() + worth / beta).softmax(-1)
    assert torch.allclose(policy.logits.softmax(-1)[0], expected, atol=0.04)


def test_without_a_reward_it_stays_where_it_is_priced_to_stay():
    policy = Table(1, 3, [0.2, 0.3, 0.5], rate=0.01)
    history = train_table(policy, lambda answers: np.zeros(len(answers)), beta=1.0)
    assert torch.allclose(policy.logits.softmax(-1)[0], torch.tensor([0.2, 0.3, 0.5]), atol=0.04)
    assert all(point["mean"] == 0 for point in history)


def test_gradients_of_parts_add_up_to_that_of_the_whole():
    ends = []
    for at_once in (256, 60):
        policy = Table(1, 4)
        train_table(policy, lambda answers: answers[:, 0] / 3, at_once=at_once, steps=3, beta=0.1)
        ends.append(policy.logits.detach().clone())
    assert torch.allclose(*ends, atol=1e-4)


# ------------------------------------------------------------------------------------------------ a language model


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rows = [(f"The ferry {n} leaves at nine.", f"Shout it {n} times.", f"FERRY {n} LEAVES!") for n in range(6)]
    return pd.DataFrame(rows, columns=["original_text", "rewrite_prompt", "rewritten_text"])


@pytest.fixture(scope="module")
def small() -> str:
    names = ("rows", "words", "samples", "new_tokens", "steps", "rows_a_step", "at_once", "rank")
    return "{" + ", ".join(f'"PPOSettings.{name}": {getattr(QUICK, name)}' for name in names) + "}"


@pytest.fixture(scope="module")
def policy() -> ppo.LanguageModelPolicy:
    base = str(ASSETS / "tiny-gemma")
    tokenizer = ppo.load_tokenizer(base)
    model = ppo.attach_adapter(ppo.load_model(base), ppo.LoraSettings(rank=2))
    return ppo.LanguageModelPolicy(rewards.ready(model, tokenizer, QUICK), tokenizer, QUICK)


@pytest.fixture(scope="module")
def batch() -> pd.DataFrame:
    texts = [("Short.", "SHORT!"), ("A rather longer text about a ferry and its captain.", "A LONGER TEXT!")]
    return pd.DataFrame({"request": [recovery_request(*pair) for pair in texts]})


def test_log_probs_are_those_of_the_model_asked_for_one_answer_alone(policy, batch):
    torch.manual_seed(0)
    rollout = policy.sample(batch)
    found, values = policy.evaluate(rollout)
    assert found.shape == values.shape == rollout.answers.shape == (4, rollout.mask.shape[1])
    for row in (0, 3):  # one padded on the left, one not
        ids = rollout.ids[row][rollout.attention[row].bool()]
        length = int(rollout.mask[row].sum())
        logits = policy.model(ids[None]).logits[0, -length - 1 : -1].log_softmax(-1)
        alone = logits.gather(1, ids[-length:, None])[:, 0]
        assert torch.allclose(found[row, :length], alone, atol=2e-3)


def test_an_answer_ends_with_the_mark_that_ends_a_turn(policy):
    end = policy.ends[1]
    answers = torch.tensor([[5, end, 7, 7]])
    ended = ppo.Rollout(answers, torch.tensor([[1.0, 1, 0, 0]]))
    assert policy.texts(ended) == [policy.tokenizer.decode([5])]


def test_at_the_start_policy_and_reference_agree_and_only_the_adapter_learns(policy, batch):
    rollout = policy.sample(batch)
    with torch.no_grad():
        assert torch.allclose(policy.evaluate(rollout)[0], policy.reference(rollout), atol=1e-5)
    trained, head = (group["params"] for group in policy.groups())
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in [*trained, *head])
    names = [name for name, weight in policy.model.named_parameters() if weight.requires_grad]
    assert len(names) == len(trained) and all("lora_" in name for name in names)


def test_from_the_base_it_learns_answers_and_says_how_it_went(table, small, monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_SETTINGS", small)
    task = Task(get_profile("local"), table, table.head(0), tmp_path)
    one, again = ppo.build(task), ppo.build(task)
    assert one.name == "ppo-base" and [point["step"] for point in one.history] == [1, 2]
    assert one.history == again.history and one.history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(0 <= point["low"] <= point["mean"] <= point["high"] <= 1 for point in one.history)
    weights = [weight for name, weight in one.model.named_parameters() if "lora_B" in name]
    assert any(weight.abs().sum() > 0 for weight in weights)
    answers = one.recover(table[["original_text", "rewritten_text"]])
    assert answers == again.recover(table[["original_text", "rewritten_text"]])
    assert len(answers) == len(table) and all(answer.strip() for answer in answers)


def test_from_an_adapter_that_is_not_there_says_what_to_do(table, small, monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_SETTINGS", small)
    task = Task(get_profile("local"), table, table.head(0), tmp_path)
    with pytest.raises(InputError, match="run Part 2"):
        ppo.build(task, start="tuned")
    with pytest.raises(InputError, match="base or tuned"):
        ppo.build(task, start="middle")
