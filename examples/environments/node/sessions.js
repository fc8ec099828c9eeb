'use strict';

// Owns the lives of episodes: sessions with leases in bounded number, and steps that can be repeated.
// Every function here runs to its end in one turn of the event loop, so a caller who gives up leaves nothing half done.

const crypto = require('node:crypto');
const { quote, refuse } = require('./errors');

const LIMITS = { max_text_bytes: 1 << 20, step_timeout_s: 30, default_lease_s: 300, max_lease_s: 3600 };
const MAX_KEY_CHARACTERS = 128;

class Sessions {
  /** `begin(taskId, seed)` gives {task, game}; `now` is in seconds. */
  constructor(begin, capacity, now = () => performance.now() / 1000) {
    Object.assign(this, { begin, capacity, now });
    this.byId = new Map();
    this.byKey = new Map();
    this.isDraining = false;
  }

  get size() {
    return this.byId.size;
  }

  open({ task_id: taskId, seed, idempotency_key: key, lease_s: wish }) {
    const lease = grantLease(wish);
    if (key.length > MAX_KEY_CHARACTERS) {
      throw refuse.invalid(`idempotency_key has ${key.length} characters, the limit is ${MAX_KEY_CHARACTERS}. Shorten it.`);
    }
    this.reap();
    const request = JSON.stringify([taskId, seed, lease]);
    const known = key && this.byKey.get(key);
    if (known) {
      if (known.request !== request) {
        throw refuse.conflict(`Idempotency key ${quote(key)} opened another task, seed or lease. Use a fresh key per session.`);
      }
      this.renew(known);
      return known.opened;
    }
    const { task, game } = this.begin(taskId, BigInt(seed));
    this.reserve();
    const opened = {
      session_id: crypto.randomUUID(),
      task: { ...task, seed },
      observation: game.describe(),
      admissible_actions: game.listActions(),
      info: {},
      lease_s: lease,
    };
    const session = { opened, game, key, request, lease, last: null };
    this.renew(session);
    this.byId.set(opened.session_id, session);
    if (key) this.byKey.set(key, session);
    return opened;
  }

  step({ session_id: sessionId, step_index: index, text }) {
    const session = this.byId.get(sessionId);
    if (!session || this.isExpired(session)) {
      throw refuse.unknown(`No session ${quote(sessionId)}: it was closed, or idle for longer than its lease. Open another.`);
    }
    const { last } = session;
    if (last && index === last.index) {
      if (text !== last.text) throw refuse.conflict(`Step ${index} was taken with another text. Retry with the same text.`);
    } else {
      checkNext(index, text, last);
      session.last = { index, text, answer: session.game.step(text) };
    }
    this.renew(session);
    return session.last.answer;
  }

  close(sessionId) {
    const session = this.byId.get(sessionId);
    if (!session) return;
    this.byId.delete(sessionId);
    this.byKey.delete(session.key);
  }

  /** Closes the sessions whose lease is over. */
  reap() {
    for (const [sessionId, session] of this.byId) {
      if (this.isExpired(session)) this.close(sessionId);
    }
  }

  reserve() {
    if (this.isDraining) throw refuse.unavailable('This server is shutting down. Open the session on another.');
    if (this.size >= this.capacity) {
      throw refuse.full(`All ${this.capacity} sessions are taken. Retry after a while, or start with a larger --capacity.`, {
        max_sessions: String(this.capacity),
      });
    }
  }

  renew(session) {
    session.expiresAt = this.now() + session.lease;
  }

  isExpired(session) {
    return this.now() >= session.expiresAt;
  }
}

function grantLease(wish) {
  if (!Number.isFinite(wish) || wish < 0) {
    throw refuse.invalid(`lease_s is ${wish}; ask for a number of seconds of at least 0 (0: the default).`);
  }
  return Math.min(wish || LIMITS.default_lease_s, LIMITS.max_lease_s);
}

function checkNext(index, text, last) {
  const next = last ? last.index + 1 : 0;
  const fields = { next_step_index: String(next) };
  if (index !== next) throw refuse.conflict(`Got step_index ${index}, expected ${next}. Send steps in order.`, fields);
  if (last && (last.answer.terminated || last.answer.truncated)) {
    throw refuse.conflict(`Step ${index} comes after the end of the episode. Close it and open another.`, fields);
  }
  const size = Buffer.byteLength(text);
  if (size > LIMITS.max_text_bytes) {
    throw refuse.invalid(`Text of ${size} bytes, the limit is ${LIMITS.max_text_bytes}. Bound the response's tokens.`);
  }
}

module.exports = { LIMITS, Sessions };
