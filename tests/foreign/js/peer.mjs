// One js-libp2p node, steered by JSON lines: {"id", "op", ...arguments} on stdin, {"id", "result" or "error"} on stdout.
// Bytes travel as hex. It ends with its stdin. Settings come as JSON in the first argument: `server`: whether it answers
// DHT queries; `relay`: whether it relays for others; `swarmKey`: the file of a private swarm's key, as text.

import './node20.mjs'
import { createHash } from 'node:crypto'
import { createInterface } from 'node:readline'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify, identifyPush } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { preSharedKey } from '@libp2p/pnet'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import * as raw from 'multiformats/codecs/raw'
import * as Digest from 'multiformats/hashes/digest'
import { openRecord, selectors, validators } from './records.mjs'

const ECHO = '/test/echo'
const SHA2_256 = 0x12
const RELAYED_TOO = { runOnLimitedConnection: true }

const settings = JSON.parse(process.argv[2])
const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  connectionProtector: settings.swarmKey && preSharedKey({ psk: Buffer.from(settings.swarmKey) }),
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    identifyPush: identifyPush(),
    ping: ping({ maxOutboundStreams: 8 }), // not 1, as the DHT pings too
    ...(settings.relay ? { relay: circuitRelayServer() } : {}),
    dht: kadDHT({
      protocol: '/ipfs/kad/1.0.0',
      clientMode: !settings.server,
      peerInfoMapper: passthroughMapper, // the default hides loopback addresses
      validators,
      selectors
    })
  }
})

const hex = (bytes) => Buffer.from(bytes).toString('hex')
const contentOf = (digest) => CID.createV1(raw.code, Digest.create(SHA2_256, Buffer.from(digest, 'hex')))
const open = (peer, protocol) => node.dialProtocol(peerIdFromString(peer), protocol, RELAYED_TOO)

// Echoes until the remote's end of stream, then ends its own side.
await node.handle(ECHO, async (stream) => {
  for await (const chunk of arriving(stream)) await send(stream, chunk)
  await stream.close()
}, RELAYED_TOO)

// Reads until the remote ends its side, and only then answers: with the SHA-256 of what came.
await node.handle('/test/digest', async (stream) => {
  const [digest] = await drain(stream)
  await send(stream, Buffer.from(digest, 'hex'))
  await stream.close()
})

// Reads nothing for as long as it is asked to wait, so that its window closes; then as /test/echo.
await node.handle('/test/lazy', async (stream) => {
  stream.pause()
  await new Promise((resolve) => setTimeout(resolve, 1000))
  stream.resume()
  for await (const chunk of arriving(stream)) await send(stream, chunk)
  await stream.close()
})

// Reads a little, then resets.
await node.handle('/test/reset', (stream) => {
  stream.addEventListener('message', () => stream.abort(new Error('a reset was wanted')), { once: true })
})

// The iterator of js-libp2p 3 never ends if the remote had ended its side, having sent nothing, before it began.
async function * arriving (stream) {
  if (stream.remoteWriteStatus === 'writable' || stream.readBufferLength > 0) yield * stream
}

async function send (stream, data) {
  if (!stream.send(data)) await stream.onDrain()
}

async function drain (stream) {
  const hash = createHash('sha256')
  let size = 0
  for await (const chunk of arriving(stream)) {
    hash.update(chunk.subarray())
    size += chunk.byteLength
  }
  return [hash.digest('hex'), size]
}

async function sendPattern (stream, size) {
  const block = Buffer.from(Array.from({ length: 65_521 }, (_, index) => index * 31 & 0xff)) // a prime: frames shift
  const hash = createHash('sha256')
  for (let left = size; left > 0; left -= block.length) {
    const part = block.subarray(0, Math.min(left, block.length))
    hash.update(part)
    await send(stream, part)
  }
  await stream.close() // of the writing side
  return hash.digest('hex')
}

async function collect (events, ...names) {
  const found = []
  for await (const event of events) if (names.includes(event.name)) found.push(event)
  return found
}

const addressesOf = (info) => info.multiaddrs.map(String)

const operations = {
  self: () => ({ peer: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) }),

  dial: async ({ addr }) => (await node.dial(multiaddr(addr))).remotePeer.toString(),

  // Listens behind a relay (its multiaddr with /p2p-circuit), and waits until that has given it an address.
  reserve: async ({ addr }) => {
    await node.components.transportManager.listen([multiaddr(addr)])
    return node.getMultiaddrs().map(String).filter((each) => each.includes('/p2p-circuit/'))
  },

  handle: ({ protocol }) => node.handle(protocol, () => {}),

  hangUp: ({ peer }) => node.hangUp(peerIdFromString(peer)),

  // What identify told about a peer; `signed` are the addresses that its signed peer record vouches for.
  known: async ({ peer }) => {
    const { metadata, protocols, addresses } = await node.peerStore.get(peerIdFromString(peer))
    const texts = (some) => some.map(({ multiaddr }) => multiaddr.toString())
    return {
      agent: Buffer.from(metadata.get('AgentVersion') ?? []).toString(),
      protocols,
      addrs: texts(addresses),
      signed: texts(addresses.filter(({ isCertified }) => isCertified))
    }
  },

  // [peer id, whether it goes through a relay] of each connection
  connections: () => node.getConnections().map(({ remotePeer, limits }) => [remotePeer.toString(), limits != null]),

  ping: ({ peer }) => node.services.ping.ping(peerIdFromString(peer)),

  routingTable: () => node.services.dht.routingTable.size,

  get: async ({ key }) => {
    const values = await collect(node.services.dht.get(Buffer.from(key)), 'VALUE')
    return values.length === 0 ? null : hex(values.at(-1).value)
  },

  openRecord: ({ value }) => openRecord(Buffer.from(value, 'hex')),

  put: async ({ key, value }) => {
    const events = await collect(node.services.dht.put(Buffer.from(key), Buffer.from(value, 'hex')), 'PEER_RESPONSE')
    return events.filter(({ messageName }) => messageName === 'PUT_VALUE').length
  },

  provide: async ({ digest }) => {
    const events = await collect(node.services.dht.provide(contentOf(digest)), 'PEER_RESPONSE')
    return events.filter(({ messageName }) => messageName === 'ADD_PROVIDER').length
  },

  providers: async ({ digest }) => {
    const events = await collect(node.services.dht.findProviders(contentOf(digest)), 'PROVIDER')
    const infos = events.flatMap(({ providers }) => providers)
    return Object.fromEntries(infos.map((info) => [info.id.toString(), addressesOf(info)]))
  },

  find: async ({ peer }) => {
    const found = await collect(node.services.dht.findPeer(peerIdFromString(peer)), 'FINAL_PEER')
    return found.flatMap((event) => addressesOf(event.peer))
  },

  // Sends a pattern, ends its side, and reads on: digests and size of what went and what came back.
  echo: async ({ peer, size, protocol = ECHO }) => {
    const stream = await open(peer, protocol)
    const [sent, [received, count]] = await Promise.all([sendPattern(stream, size), drain(stream)])
    return { sent, received, count, status: stream.status }
  },

  // Opens a stream, sends a byte, and resets it once that was answered.
  reset: async ({ peer, protocol }) => {
    const stream = await open(peer, protocol)
    stream.send(Buffer.from([1]))
    await new Promise((resolve) => stream.addEventListener('message', resolve, { once: true }))
    stream.abort(new Error('a reset was wanted'))
  },

  // Opens a stream and says how it ended: 'closed', 'reset' or 'aborted', and why.
  ending: async ({ peer, protocol }) => {
    const stream = await open(peer, protocol)
    const ended = new Promise((resolve) => stream.addEventListener('close', resolve, { once: true }))
    stream.send(Buffer.from([1]))
    return { status: (await ended, stream.status), error: (await ended).error?.name ?? null }
  },

  negotiate: async ({ peer, protocols }) => (await open(peer, protocols)).protocol
}

for await (const line of createInterface({ input: process.stdin })) {
  const { id, op, ...rest } = JSON.parse(line)
  Promise.resolve()
    .then(() => operations[op](rest))
    .then((result = null) => ({ id, result }), (error) => ({ id, error: `${error.name}: ${error.message}` }))
    .then((answer) => process.stdout.write(JSON.stringify(answer) + '\n'))
}
await node.stop()
