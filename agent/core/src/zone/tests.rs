use super::*;

#[test]
fn an_empty_zone_has_its_own_names() {
    let zone = Zone::default();
    assert_eq!(zone.answer(&["dns-version"], Kind::Txt, 0, 9), found([Data::Txt("1.0.0")]));
    assert_eq!(zone.answer(&[], Kind::Soa, 0, 9), found([Data::Soa]));
    assert_eq!(zone.answer(&["svc"], Kind::A, 0, 9), Answer::NoData);
    assert_eq!(zone.answer(&["web", "shop", "svc"], Kind::A, 0, 9), Answer::NoName);
}
