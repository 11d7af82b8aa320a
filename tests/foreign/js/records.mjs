// azu's records as docs/protocol.md describes them, read with js-libp2p's own envelopes and a foreign CBOR decoder.

import { peerIdFromPublicKey } from '@libp2p/peer-id'
import { RecordEnvelope } from '@libp2p/peer-record'
import { decode } from 'cborg'

const KINDS = { 'azu-worker': '/azu/worker-record/1', 'azu-coordinator': '/azu/coordinator-record/1' }

// The record in an envelope, whose signature must hold; throws if it does not.
export async function openRecord (value, kind = KINDS['azu-worker']) {
  const envelope = await RecordEnvelope.openAndCertify(value, kind)
  if (Buffer.from(envelope.payloadType).toString() !== kind) throw new Error('an envelope of another kind')
  const record = decode(envelope.payload.subarray(), { strict: true, rejectDuplicateMapKeys: true })
  const signer = peerIdFromPublicKey(envelope.publicKey).toString()
  if (record.peer_id !== signer) throw new Error(`signed by ${signer}, not by ${record.peer_id}`)
  return record
}

async function validate (key, value) {
  const [, namespace, name] = Buffer.from(key).toString().split('/')
  const record = await openRecord(value, KINDS[namespace])
  if (record.peer_id !== name) throw new Error(`a record of ${record.peer_id} under the key of ${name}`)
}

async function selectNewest (key, values) {
  const [, namespace] = Buffer.from(key).toString().split('/')
  const records = await Promise.all(values.map((value) => openRecord(value, KINDS[namespace])))
  const sequences = records.map(({ sequence }) => sequence)
  return sequences.indexOf(Math.max(...sequences))
}

export const validators = Object.fromEntries(Object.keys(KINDS).map((name) => [name, validate]))
export const selectors = Object.fromEntries(Object.keys(KINDS).map((name) => [name, selectNewest]))
