from qwen.serving_pace import MIN_PROMPT_TOKENS, STEP_SECONDS, Pace


def test_a_step_reads_what_fits_into_its_time_beside_the_replies():
    pace = Pace()
    for _ in range(50):
        pace.note_step(100, 0.2)  # 2 ms a token
    assert pace.prompt_tokens(0) in (int(STEP_SECONDS / 0.002), int(STEP_SECONDS / 0.002) - 1)
    assert pace.prompt_tokens(8) == pace.prompt_tokens(0) - 8


def test_however_slow_the_machine_prompts_go_on():
    pace = Pace()
    for _ in range(50):
        pace.note_step(100, 100.0)
    assert pace.prompt_tokens(8) == MIN_PROMPT_TOKENS


def test_steps_of_few_tokens_say_nothing_about_what_a_token_costs():
    pace, before = Pace(), Pace().prompt_tokens(0)
    pace.note_step(1, 5.0)
    assert pace.prompt_tokens(0) == before


def test_a_machine_that_slows_down_is_noticed_sooner_than_one_that_recovers():
    slower, faster = Pace(), Pace()
    slower.note_step(100, 1.2)
    faster.note_step(100, 1.2)
    faster.note_step(100, 0.6)
    assert slower.prompt_tokens(0) <= faster.prompt_tokens(0) < Pace().prompt_tokens(0)


def test_wait_grows_with_the_place_and_follows_the_latest_turns():
    pace = Pace()
    assert pace.wait_seconds(2, 8) == 2 * pace.wait_seconds(1, 8)
    for _ in range(50):
        pace.note_turn(4.0)
    assert abs(pace.wait_seconds(2, 8) - 1.0) < 0.01
