"""A complete environment. Serve it: `python examples/environments/guess_number.py`."""

import random

from sdar.environments import Environment, Observation, StepResult, Task, serve


class GuessNumber(Environment):
    name, version, splits, max_turns = "guess_number", "1", ("train", "heldout"), 7
    instructions = (
        "Find the number I think of. After each guess I say whether mine is higher or lower."
    )
    action_format = "One whole number."

    def __init__(self, largest: int = 100) -> None:
        self.numbers = {str(number): number for number in range(1, largest + 1)}
        task = f"Guess a number from 1 to {largest}."
        self.tasks = {
            split: [
                Task(self.name, split, f"{split}-{i}", "guess", task, seed=i) for i in range(50)
            ]
            for split in self.splits
        }

    def reset(self, task_id: str, seed: int) -> Observation:
        self.number = random.Random(f"{task_id} {seed}").randint(1, len(self.numbers))
        self.num_guesses = 0
        return Observation(self.get_task(task_id).description)

    def step(self, text: str) -> StepResult:
        self.num_guesses += 1
        is_last, guess = self.num_guesses == self.max_turns, self.numbers.get(text.strip())
        if guess is None:
            return StepResult(
                Observation("That is none of them."), is_action_valid=False, truncated=is_last
            )
        if guess == self.number:
            return StepResult(
                Observation("Right!"),
                reward=1.0,
                terminated=True,
                action=str(guess),
                is_success=True,
            )
        hint = "higher" if guess < self.number else "lower"
        return StepResult(
            Observation(f"My number is {hint}."), truncated=is_last, action=str(guess)
        )


if __name__ == "__main__":
    serve(GuessNumber)
