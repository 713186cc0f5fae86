// Package custodianv1 is the gRPC contract of Custodian: the services that
// packagers, DRM providers, operators, officers and auditors call. All but this
// file is generated from the .proto files beside it, which say what the fields
// mean; make generate does that.
//
// Numbers and names that later parts of the contract need are reserved in the
// messages.
package custodianv1
