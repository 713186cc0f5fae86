// Package admission decides which of too many calls come in.
//
// A Gate bounds how many keys are worked on at once. While there is room, a call
// pays a few atomic operations and the gate is not noticed. Where there is none,
// calls wait in a queue for each caller, and the callers take turns. A call comes
// to wait only if it can be expected to be answered in its time, at the rate at
// which keys really come out; it is sent away at once otherwise, because work on
// an answer that comes too late is what makes an overloaded server collapse.
//
// What a call is, who the callers are and what they hear is decided elsewhere.
// Of the well-kept libraries, those that adapt a limit know no callers and no
// deadlines, and those with queues have a mutex in the path of every call.
package admission
