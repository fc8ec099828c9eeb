'use strict';

// Owns the wire: sdar.v1.EnvironmentService with health and reflection, from start to graceful stop.

const { parseArgs } = require('node:util');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');
const { HealthImplementation } = require('grpc-health-check');
const { ReflectionService } = require('@grpc/reflection');
const { PROTO_ROOT, answer, quote, refuse } = require('./errors');
const { LIMITS, Sessions } = require('./sessions');
const jugs = require('./jugs');

const SERVICE = 'sdar.v1.EnvironmentService';
const SPLITS = ['train', 'heldout'];
const MAX_PAGE_SIZE = 1000;
const REAP_EVERY_MS = 1000;
const DRAIN_MS = 5000;

function checkEnvironment(name) {
  if (name !== jugs.NAME) throw refuse.unknown(`No environment ${quote(name)} is served here. Use ${jugs.NAME}.`);
}

function beginEpisode(taskId, seed) {
  const task = jugs.TASKS_BY_ID.get(taskId);
  if (!task) throw refuse.unknown(`Environment ${jugs.NAME} has no task ${quote(taskId)}. List the tasks of a split.`);
  return { task, game: new jugs.JugsGame(task, seed) };
}

function buildHandlers(sessions) {
  return {
    Describe: answer(({ environment }) => {
      if (environment) checkEnvironment(environment);
      const description = {
        name: jugs.NAME,
        version: jugs.VERSION,
        splits: SPLITS.map((name) => ({ name, num_tasks: listSplit(name).length })),
        instructions: jugs.INSTRUCTIONS,
        action_format: jugs.ACTION_FORMAT,
        limits: { ...LIMITS, max_turns: jugs.MAX_TURNS },
        capacity: { max_sessions: sessions.capacity, num_open_sessions: sessions.size },
      };
      return { environments: [description] };
    }),
    ListTasks: answer(({ environment, split, page_size: pageSize, page_token: token }) => {
      checkEnvironment(environment);
      const tasks = listSplit(split);
      const start = parsePageToken(token, tasks.length);
      const end = start + Math.min(pageSize || MAX_PAGE_SIZE, MAX_PAGE_SIZE);
      return { tasks: tasks.slice(start, end), next_page_token: end < tasks.length ? String(end) : '' };
    }),
    OpenSession: answer((request) => {
      checkEnvironment(request.environment);
      return sessions.open(request);
    }),
    Step: answer((request) => sessions.step(request)),
    CloseSession: answer((request) => {
      sessions.close(request.session_id);
      return {};
    }),
  };
}

function listSplit(split) {
  if (!SPLITS.includes(split)) {
    throw refuse.unknown(`Environment ${jugs.NAME} has no split ${quote(split)}. Use one of ${SPLITS.join(', ')}.`);
  }
  return jugs.TASKS.filter((task) => task.split === split);
}

function parsePageToken(token, numTasks) {
  if (token && !(/^\d{1,9}$/.test(token) && Number(token) <= numTasks)) {
    throw refuse.invalid(`Unknown page_token ${quote(token)}. Send the next_page_token of the page before, or none.`);
  }
  return Number(token);
}

/** Stops opening sessions, lets open ones finish for a while, then closes the server. */
function stop(server, sessions, health) {
  if (sessions.isDraining) return;
  sessions.isDraining = true;
  for (const name of ['', SERVICE]) health.setStatus(name, 'NOT_SERVING');
  const deadline = Date.now() + DRAIN_MS;
  const waiting = setInterval(() => {
    if (sessions.size && Date.now() < deadline) return;
    clearInterval(waiting);
    server.tryShutdown(() => process.exit(0));
    // A channel that is kept open must not keep the process.
    setTimeout(() => server.forceShutdown(), DRAIN_MS).unref();
  }, 50);
}

function main() {
  const { values } = parseArgs({
    options: {
      host: { type: 'string', default: '127.0.0.1' },
      port: { type: 'string', default: '50051' },
      capacity: { type: 'string', default: '64' },
    },
  });
  const capacity = Number(values.capacity);
  if (!Number.isSafeInteger(capacity) || capacity < 1) {
    console.error(`error: --capacity is ${values.capacity}, expected a number of sessions of at least 1.`);
    process.exit(2);
  }
  const definition = protoLoader.loadSync('sdar/v1/environment.proto', {
    includeDirs: [PROTO_ROOT],
    keepCase: true, // the names as the contract has them
    longs: String, // a seed is an int64, more than a double holds
    defaults: true,
  });
  const { sdar } = grpc.loadPackageDefinition(definition);
  const sessions = new Sessions(beginEpisode, capacity);
  const server = new grpc.Server();
  server.addService(sdar.v1.EnvironmentService.service, buildHandlers(sessions));
  const health = new HealthImplementation({ '': 'SERVING', [SERVICE]: 'SERVING' });
  health.addToServer(server);
  new ReflectionService(definition).addToServer(server);
  const host = values.host.includes(':') ? `[${values.host}]` : values.host;
  server.bindAsync(`${host}:${values.port}`, grpc.ServerCredentials.createInsecure(), (error, port) => {
    if (error) {
      console.error(`error: Cannot serve on ${host}:${values.port}: ${error.message}. Free the port, or choose another.`);
      process.exit(2);
    }
    setInterval(() => sessions.reap(), REAP_EVERY_MS).unref();
    for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => stop(server, sessions, health));
    console.log(`Serving ${jugs.NAME} on ${host}:${port}`);
  });
}

main();
