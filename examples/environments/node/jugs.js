'use strict';

// Owns the game: measure a number of litres with two jugs. Knows no session and no wire.

const MAX_TURNS = 20;
const HELDOUT_EVERY = 5;

const NAME = 'jugs';
const VERSION = '1';
const INSTRUCTIONS = 'You have two jugs, a tap and a sink. Measure the litres asked for: one of the jugs must hold exactly that much.';
const ACTION_FORMAT = 'One line: fill JUG, empty JUG or pour JUG into JUG, where JUG is small or large.';

const TASKS = listTasks();
const TASKS_BY_ID = new Map(TASKS.map((task) => [task.task_id, task]));

function listTasks() {
  const tasks = [];
  for (let small = 3; small <= 9; small += 1) {
    for (let large = small + 1; large <= 12; large += 1) {
      for (let target = 1; target < large; target += 1) {
        // What two jugs can measure: the multiples of their greatest common divisor.
        if (target !== small && target % greatestCommonDivisor(small, large) === 0) {
          tasks.push({
            environment: NAME,
            split: tasks.length % HELDOUT_EVERY === HELDOUT_EVERY - 1 ? 'heldout' : 'train',
            task_id: `jugs-${small}-${large}-${target}`,
            task_type: 'measure',
            description: `Measure exactly ${target} litres with a jug of ${small} litres and a jug of ${large} litres.`,
            seed: '0',
            goal: { small, large, target },
          });
        }
      }
    }
  }
  return tasks;
}

function greatestCommonDivisor(a, b) {
  return b === 0 ? a : greatestCommonDivisor(b, a % b);
}

/** One episode. The seed, a BigInt, decides how much water the small jug holds at the start. */
class JugsGame {
  constructor(task, seed) {
    const { small, large, target } = task.goal;
    const places = BigInt(small + 1);
    const start = Number(((seed % places) + places) % places);
    this.target = target;
    this.sizes = { small, large };
    this.litres = { small: start === target ? 0 : start, large: 0 };
    this.numTurns = 0;
  }

  describe() {
    const { small, large } = this.litres;
    return `The small jug holds ${small} of ${this.sizes.small} litres, the large jug ${large} of ${this.sizes.large}.`;
  }

  listActions() {
    const actions = [];
    for (const jug of ['small', 'large']) {
      const other = jug === 'small' ? 'large' : 'small';
      if (this.litres[jug] < this.sizes[jug]) actions.push(`fill ${jug}`);
      if (this.litres[jug] > 0) actions.push(`empty ${jug}`);
      if (this.litres[jug] > 0 && this.litres[other] < this.sizes[other]) actions.push(`pour ${jug} into ${other}`);
    }
    return actions;
  }

  /** Plays any text; one that is no possible action uses the turn and changes nothing. */
  step(text) {
    const action = text.trim().toLowerCase();
    const isValid = this.listActions().includes(action);
    if (isValid) this.move(action.split(' '));
    this.numTurns += 1;
    const isSolved = Object.values(this.litres).includes(this.target);
    return {
      observation: isValid ? this.describe() : `Nothing happens. ${this.describe()}`,
      admissible_actions: this.listActions(),
      reward: isSolved ? 1 : 0,
      reward_components: { success: isSolved ? 1 : 0 },
      terminated: isSolved,
      truncated: !isSolved && this.numTurns >= MAX_TURNS,
      action: isValid ? action : '',
      is_action_valid: isValid,
      is_success: isSolved,
      info: {},
    };
  }

  move([verb, jug, , other]) {
    if (verb === 'fill') this.litres[jug] = this.sizes[jug];
    if (verb === 'empty') this.litres[jug] = 0;
    if (verb === 'pour') {
      const moved = Math.min(this.litres[jug], this.sizes[other] - this.litres[other]);
      this.litres[jug] -= moved;
      this.litres[other] += moved;
    }
  }
}

module.exports = { ACTION_FORMAT, INSTRUCTIONS, JugsGame, MAX_TURNS, NAME, TASKS, TASKS_BY_ID, VERSION };
