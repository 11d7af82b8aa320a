from __future__ import annotations

from azu.demo.run import Answer


def test_an_answer_of_one_piece_has_no_speed() -> None:
    usage = {"completion_tokens": 2}  # a word and the stop token
    assert Answer("Paris", "stop", 0.5, 0.5, usage).tokens_per_s == 0.0
    assert Answer("", "stop", 0.0, 0.0, {}).tokens_per_s == 0.0
    assert Answer("It is Paris", "stop", 0.5, 1.0, {"completion_tokens": 4}).tokens_per_s == 6.0
