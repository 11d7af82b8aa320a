// js-libp2p 3 wants node 22 for this one function of ECMAScript 2024; with it, node 20 will do.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((...both) => { [resolve, reject] = both })
  return { promise, resolve, reject }
}
