'use strict';

// Owns how a refusal travels: a gRPC status whose trailer holds a google.rpc.Status with one sdar.v1.ErrorDetail.

const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const protobuf = require('protobufjs');

const PROTO_ROOT = path.resolve(__dirname, '../../../proto');
const MAX_SHOWN_CHARACTERS = 200;

// google/rpc/status.proto and google/protobuf/any.proto, as far as they are needed here.
const source = `
  syntax = "proto3";
  package google;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
`;
const { root } = protobuf.parse(source, { keepCase: true });
const Status = root.lookupType('google.Status');
const ErrorDetail = protobuf.loadSync(path.join(PROTO_ROOT, 'sdar/v1/error.proto')).lookupType('sdar.v1.ErrorDetail');

/** What the caller did wrong, or what is missing here; anything else that is thrown is a defect of this server. */
class Refusal extends Error {
  constructor(code, reason, message, fields = {}) {
    super(message);
    Object.assign(this, { code, reason, fields });
  }
}

const refuse = {
  unknown: (message) => new Refusal(grpc.status.NOT_FOUND, 'UNKNOWN_RESOURCE', message),
  invalid: (message) => new Refusal(grpc.status.INVALID_ARGUMENT, 'INVALID_INPUT', message),
  conflict: (message, fields) => new Refusal(grpc.status.FAILED_PRECONDITION, 'CONFLICT', message, fields),
  full: (message, fields) => new Refusal(grpc.status.RESOURCE_EXHAUSTED, 'CAPACITY', message, fields),
  unavailable: (message) => new Refusal(grpc.status.UNAVAILABLE, 'UNAVAILABLE', message),
};

/** A unary handler of gRPC, made of a function from request to response that may throw a Refusal. */
function answer(handle) {
  return (call, callback) => {
    let response;
    try {
      response = handle(call.request);
    } catch (error) {
      callback(toStatus(error));
      return;
    }
    callback(null, response);
  };
}

function toStatus(error) {
  let refusal = error;
  if (!(error instanceof Refusal)) {
    console.error(error);
    refusal = new Refusal(grpc.status.INTERNAL, 'INTERNAL', "Failed on an unexpected error, which is in the server's log.");
  }
  const { code, reason, message, fields } = refusal;
  const value = ErrorDetail.encode({ reason, message, fields }).finish();
  const details = [{ type_url: 'type.googleapis.com/sdar.v1.ErrorDetail', value }];
  const metadata = new grpc.Metadata();
  metadata.set('grpc-status-details-bin', Buffer.from(Status.encode({ code, message, details }).finish()));
  return { code, details: message, metadata };
}

/** A caller's text for a message: whatever was sent, a trailer has to stay small. */
function quote(text) {
  return JSON.stringify(text.length > MAX_SHOWN_CHARACTERS ? `${text.slice(0, MAX_SHOWN_CHARACTERS)}…` : text);
}

module.exports = { PROTO_ROOT, answer, quote, refuse };
