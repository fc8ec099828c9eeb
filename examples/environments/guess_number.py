"""A complete environment. Serve it: `python examples/environments/guess_number.py`."""

import random

from sdar.environments import Environment, Observation, StepResult, Task, drop_thoughts, serve


class GuessNumber(Environment):
    name = "guess_number"
    version = "1"
    splits = ("train", "heldout")
    max_turns = 7
    instructions = (
        "Find the number I think of. After each guess I say whether mine is higher or lower."
    )
    action_format = "One whole number."

    def __init__(self, largest: int = 100) -> None:
        self.numbers = {str(number): number for number in range(1, largest + 1)}
        task = f"Guess a number from 1 to {largest}."
        self.tasks: dict[str, list[Task]] = {}
        for split in self.splits:
            self.tasks[split] = [
                Task(self.name, split, f"{split}-{i}", "guess", task, seed=i) for i in range(50)
            ]

    def reset(self, task_id: str, seed: int) -> Observation:
        self.number = random.Random(f"{task_id} {seed}").randint(1, len(self.numbers))
        self.num_guesses = 0
        return Observation(self.get_task(task_id).description)

    def step(self, text: str) -> StepResult:
        self.num_guesses += 1
        is_last = self.num_guesses == self.max_turns
        guess = self.numbers.get(drop_thoughts(text).strip())
        if guess is None:
            seen = Observation("That is none of them.")
            return StepResult(seen, is_action_valid=False, truncated=is_last)
        action = str(guess)
        if guess == self.number:
            seen = Observation("Right!")
            return StepResult(seen, reward=1.0, terminated=True, action=action, is_success=True)
        seen = Observation(f"My number is {'higher' if guess < self.number else 'lower'}.")
        return StepResult(seen, truncated=is_last, action=action)


if __name__ == "__main__":
    serve(GuessNumber)
