from services.teacher.metrics import (
    SCORED_TOKENS,
    SCORED_TRAJECTORIES,
    WAITING_SECONDS,
    TeacherMetrics,
)


def test_a_record_holds_totals_and_the_rates_since_the_record_before():
    now = [0.0]
    metrics = TeacherMetrics(clock=lambda: now[0])
    metrics.observe_version(3, 1)
    metrics.count(SCORED_TRAJECTORIES, 2)
    metrics.count(SCORED_TOKENS, 50)
    metrics.count(WAITING_SECONDS, 4)
    now[0] = 10.0
    assert metrics.collect_record() == {
        "num_scored_trajectories": 2,
        "num_tokens_scored": 50,
        "num_context_tokens": 0,
        "num_retrieval_misses": 0,
        "num_swapped_contexts": 0,
        "num_dropped_skills": 0,
        "num_dead_letters": 0,
        "num_reclaimed_entries": 0,
        "num_late_results": 0,
        "num_refused_policies": 0,
        "num_disproofs": 0,
        "teacher_version": 3,
        "lag": 1,
        "tokens_per_s": 5,
        "waiting_share": 0.4,
    }
    now[0] = 20.0
    metrics.count(SCORED_TOKENS, 10)
    record = metrics.collect_record()
    assert (record["num_tokens_scored"], record["tokens_per_s"]) == (60, 1)
    assert record["waiting_share"] == 0
