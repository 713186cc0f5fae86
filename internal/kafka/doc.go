// Package kafka takes events from Kafka topics and reports them to the domain.
//
// What an event may do, and who may report it, is the domain's to decide: a
// topic is a caller of its own, kafka:TOPIC, and needs a grant as every caller.
// It can announce a batch, packaging and a revoked session; that a key is
// compromised, it cannot say.
//
// Events are handled at least once, and in the order of their partition: an
// offset is committed when the domain has done what its event calls for, or
// when the event lies in the dead-letter topic. The domain knows events that it
// has had. An event that could be handled later, because a device is away,
// holds up its topic and no other.
package kafka
